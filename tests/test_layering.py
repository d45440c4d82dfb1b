"""The rules a reader relies on: who may import whom, how long a file may be, what every operator has."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nvfp4_moe"

# Each may import only what stands before it; one line, one level.
ORDER = [
    {"formats"},
    {"checks", "reference"},
    {"ops"},
    {"tensor"},
    {"layers", "checkpoint"},
    {"distributed", "diagnostics"},
    {"integrations", "cli", "__init__"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
MAX_LINES, MAX_COLUMNS = 400, 110
MACROS = {"NVFP4_CHECK", "CUDA_CHECK", "NVFP4_HD", "NVFP4_LAUNCH"} | {
    "NVFP4_CLONES",  # instruction sets of the CPU: what a function attribute and a pragma cannot say portably
    "CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED",  # CuTe's own switch: every N of wgmma
    "NVFP4_INLINE",
    "NVFP4_PRAGMA",
    "NVFP4_TARGET_BEGIN",
    "NVFP4_TARGET_END",
    "CUTLASS_ARCH_MMA_SM100_ENABLED",  # CUTLASS's switches, for its SM100 code on a Hopper
    "CUTLASS_ARCH_MMA_SM100A_ENABLED",
}


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / f for f in listed.stdout.split() if f.endswith(suffixes) and (ROOT / f).is_file()]


def unit(path: Path) -> str:
    """The part of the package a file belongs to: reference/moe.py -> reference."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports, relatively or by name."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {(node.module or "").split(".")[0]} if node.module else {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nvfp4_moe."):
            found.add(node.module.split(".")[1])
    return found & set(LEVEL)


def test_lower_layers_do_not_import_upper_ones():
    for path in PACKAGE.rglob("*.py"):
        mine = unit(path)
        for other in imports(path) - {mine}:
            assert LEVEL[other] < LEVEL[mine], f"{path.relative_to(ROOT)} imports {other}"


def test_the_reference_never_calls_an_operator():
    for path in (PACKAGE / "reference").glob("*.py"):
        assert "torch.ops" not in path.read_text(), path


def test_kernels_do_not_include_torch():
    for path in (ROOT / "csrc/kernels").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_kernels_of_one_chip_do_not_include_those_of_another():
    """sm90/packed.h is a layout, which the operators that pack and unpack share with the kernel."""
    chips = {"cpu", "cuda", "sm90", "sm100", "sm120"}
    for chip in chips:
        for path in (ROOT / "csrc/kernels" / chip).glob("*"):
            included = set(re.findall(r'#include "\.\./(\w+)/(?!packed\.h)', path.read_text()))
            assert not included & (chips - {chip, "cuda"}), path


def test_no_file_is_too_long_and_no_line_too_wide():
    for path in tracked(".py", ".cpp", ".h", ".cu", ".cuh"):
        lines = path.read_text().splitlines()
        assert len(lines) <= MAX_LINES, f"{path.relative_to(ROOT)} has {len(lines)} lines"
        wide = [i for i, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
        assert not wide, f"{path.relative_to(ROOT)}: lines {wide}"


def test_no_function_is_too_long():
    for path in tracked(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


def test_macros_are_few():
    found = set()
    for path in tracked(".h", ".cpp", ".cu", ".cuh"):
        found |= set(re.findall(r"#define (\w+)", path.read_text()))
    assert found <= MACROS


def test_every_operator_has_a_schema_a_kernel_a_fake_a_reference_and_a_test():
    registry = (ROOT / "csrc/ops/registry.cpp").read_text()
    public = registry[: registry.index("nvfp4_internal")]
    names = set(re.findall(r'"(\w+)\(', public)) - {"gemm_plan"}
    assert len(names) == 17
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    fakes = "".join(p.read_text() for p in (PACKAGE / "ops").glob("*.py"))
    from nvfp4_moe import ops, reference

    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nvfp4::{name}", "CPU"), name
        assert f"def _fake_{name}(" in fakes and callable(getattr(ops, name)), name
        assert callable(getattr(reference, name)), name
        assert f"ops.{name}(" in tests or f"ops.{name}," in tests, f"no test calls {name}"


def test_environment_variables_are_read_in_two_places_only():
    readers = [p.relative_to(ROOT).as_posix() for p in tracked(".py") if "os.environ" in p.read_text()]
    assert [r for r in readers if r.startswith("nvfp4_moe")] == ["nvfp4_moe/__init__.py"]

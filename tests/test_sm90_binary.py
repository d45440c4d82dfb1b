"""What the compiler made of Hopper's kernels, read off the library that was built; needs no GPU.

cuobjdump and nvdisasm come with CUDA's toolkit, or with the triton package that CUDA builds of torch bring.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import nvfp4_moe

LIBRARY = Path(nvfp4_moe._library).with_name("libnvfp4_sm90.so")


@cache
def tool(name: str) -> str | None:
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    folders += [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)


def cuobjdump(*options: str) -> str:
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built")
    if not (program := tool("cuobjdump")):
        pytest.skip("no cuobjdump")
    path = os.pathsep.join([str(Path(program).parent), os.environ["PATH"]])
    done = subprocess.run(
        [program, *options, str(LIBRARY)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    if "nvdisasm" in done.stderr:
        pytest.skip("cuobjdump finds no nvdisasm")
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def resources() -> dict[str, dict[str, int]]:
    """Function -> {"REG": 168, "STACK": 0, ...}"""
    found = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", cuobjdump("-res-usage"))
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


@cache
def instructions() -> dict[str, str]:
    """Function -> its SASS."""
    parts = re.split(r"Function : (\S+)\n", cuobjdump("-sass"))[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def tiles(functions) -> list[str]:
    found = [f for f in functions if re.search("grouped_kernel|pair_kernel", f)]
    assert found, f"no kernel of a tile among {sorted(functions)}"
    return found


def test_no_kernel_spills():
    used = resources()
    tiles(used)
    spills = {name: use for name, use in used.items() if use["STACK"] or use["LOCAL"]}
    assert not spills, "stack or local memory in use: " + "; ".join(f"{n}: {u}" for n, u in spills.items())


def test_no_kernel_stores_to_local_memory():
    """STL is what a spill looks like; -res-usage counts what a function reserves."""
    stores = {name: sass.count(" STL") for name, sass in instructions().items() if " STL" in sass}
    assert not stores


def test_every_tile_multiplies_on_the_tensor_cores_and_loads_by_the_copy_engine():
    sass = instructions()
    for name in tiles(sass):
        counts = {what: len(re.findall(rf"\b{what}", sass[name])) for what in ("HG?MMA", "UTMALDG", "UBLKCP")}
        assert all(counts.values()), f"{name}: {counts}"


def test_weights_come_from_registers_and_no_product_is_rounded_by_fewer_bits():
    """Float32 accumulators, BF16 in; HGMMA's first operand in a register, as both of HMMA's are."""
    sass = instructions()
    right = r"HGMMA\.64x\d+x16\.F32\.BF16 R\d+, R\d+,|HMMA\.16816\.F32\.BF16 "
    for name in tiles(sass):
        products = re.findall(r"HG?MMA\S*\s[^;]*", sass[name])
        other = [p for p in products if not re.match(right, p)]
        assert not other, f"{name}: {other[:3]}"


def test_the_library_holds_this_chips_code_alone():
    archs = set(re.findall(r"\bsm_\w+", cuobjdump("--list-elf")))
    assert archs == {"sm_90a"}
    assert not re.findall(r"\.ptx", cuobjdump("--list-ptx"))

"""Kernels' own sources on the CPU (tests/cpp/simt.h), once as they are and once for every mistake in them."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Mistakes = dict[str, tuple[str, str]]  # name: what the source says, what the mistake says
Source = Callable[[str, tuple[str, str] | None], str]


def in_namespace(name: str, text: str, outer: str = "blackwell") -> str:
    """CUDA as C++ for simt.h, in a namespace of its own with run_{name} to call."""
    text = re.sub(r"#(pragma|include).*", "", text)
    text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = (\1*)dynamic;", text)
    text = text.replace("__shared__", "static").replace("__grid_constant__", "")
    text = re.sub(r"__global__ void __launch_bounds__\([^()]*\)", "static void", text)
    text = re.sub(r"(\w+)<<<(\w+), (\w+), 0, \w+>>>\(", r"launch(\2, \3, \1, ", text)
    text = re.sub(r'(extern "C" \w+) run\(', rf"\1 run_{name}(", text)
    opened = f"namespace nvfp4::{outer}::{name} {{ using namespace simt; using std::max, std::min;"
    return text.replace(f"namespace nvfp4::{outer} {{", opened)


def with_mistake(text: str, mistake: tuple[str, str] | None) -> str:
    """What the source says replaced by what the mistake says."""
    if mistake is None:
        return text
    assert mistake[0] in text, f"the source has changed, say it anew: {mistake[0]}"
    return text.replace(*mistake)


def build(folder: Path, headers: Iterable[str], source: Source, mistakes: Mistakes) -> ctypes.CDLL:
    """`headers` as #include takes them, CUTLASS's and CUDA's among them, then source(name, mistake) as it is
    and with each mistake."""
    parts = [source("as_it_is", None), *(source(f"mistake_{i}", m) for i, m in enumerate(mistakes.values()))]
    compiler = os.environ.get("CXX") or shutil.which("c++")
    sys.path.insert(0, str(ROOT))
    setup = pytest.importorskip("setup", reason="not a checkout")
    cuda, cutlass = setup.CUDA_HOME, setup.cutlass_include()
    if not (compiler and cuda and cutlass):
        pytest.skip("no C++ compiler, or no CUDA and CUTLASS headers")
    code, library = folder / "kernels.cpp", folder / "kernels.so"
    code.write_text("\n".join([*(f"#include {header}" for header in headers), *parts]))
    command = [compiler, "-std=c++20", "-O1", "-w", "-fpermissive", "-ffp-contract=off", "-shared", "-fPIC"]
    command += [f"-I{path}" for path in (cutlass, f"{cuda}/include", f"{cuda}/include/cccl", ROOT)]
    subprocess.run([*command, code, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def run_with(library: ctypes.CDLL, mistakes: Mistakes, name: str):
    return getattr(library, f"run_mistake_{list(mistakes).index(name)}")

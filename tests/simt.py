"""Kernels' own sources on the CPU (tests/cpp/simt.h), once as they are and once for every mistake in them."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def in_namespace(name: str, text: str, outer: str = "blackwell") -> str:
    """CUDA as C++ for simt.h, in a namespace of its own with run_{name} to call."""
    text = re.sub(r"#(pragma|include).*", "", text)
    text = text.replace("__shared__", "static").replace("__grid_constant__", "")
    text = re.sub(r"__global__ void __launch_bounds__\([^()]*\)", "static void", text)
    text = re.sub(r"(\w+)<<<(\w+), (\w+), 0, \w+>>>\(", r"launch(\2, \3, \1, ", text)
    text = re.sub(r'(extern "C" \w+) run\(', rf"\1 run_{name}(", text)
    opened = f"namespace nvfp4::{outer}::{name} {{ using namespace simt; using std::max, std::min;"
    return text.replace(f"namespace nvfp4::{outer} {{", opened)


def build(folder: Path, headers: Iterable[str], parts: Iterable[str]) -> ctypes.CDLL:
    """`headers` as #include takes them, CUTLASS's and CUDA's among them, then the parts."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    sys.path.insert(0, str(ROOT))
    setup = pytest.importorskip("setup", reason="not a checkout")
    cuda, cutlass = setup.CUDA_HOME, setup.cutlass_include()
    if not (compiler and cuda and cutlass):
        pytest.skip("no C++ compiler, or no CUDA and CUTLASS headers")
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text("\n".join([*(f"#include {header}" for header in headers), *parts]))
    command = [compiler, "-std=c++20", "-O1", "-w", "-fpermissive", "-ffp-contract=off", "-shared", "-fPIC"]
    command += [f"-I{path}" for path in (cutlass, f"{cuda}/include", f"{cuda}/include/cccl", ROOT)]
    subprocess.run([*command, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))

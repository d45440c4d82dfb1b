"""Layer 1 for sm_120: where the emulation of mma.sync looks for a value is where CuTe says the instruction does."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
setup = pytest.importorskip("setup", reason="not a checkout")


@pytest.fixture(scope="module")
def fragments(tmp_path_factory):
    compiler, cutlass = os.environ.get("CXX") or shutil.which("c++"), setup.cutlass_include()
    if not (compiler and cutlass and setup.CUDA_HOME):
        pytest.skip("no C++ compiler, CUTLASS's or CUDA's headers")
    library = tmp_path_factory.mktemp("cpp") / "fragments.so"
    includes = [f"-I{path}" for path in (cutlass, f"{setup.CUDA_HOME}/include", f"{setup.CUDA_HOME}/include/cccl")]
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", *includes]
    subprocess.run([compiler, *flags, ROOT / "tests/cpp/fragments.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("what", ["codes_of_a", "codes_of_b", "scales_of_a", "scales_of_b", "sums"])
def test_every_value_is_held_where_cute_says(what, fragments):
    assert getattr(fragments, what)() == 0

"""sm_120's kernel and what stands in for the chip on a Hopper (tests/blackwell_on_hopper), without a GPU."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/blackwell_on_hopper")]
setup = pytest.importorskip("setup", reason="not a checkout")
lower = pytest.importorskip("lower_sm120")

REGISTERS = "{%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f5, %f6, %f7, %f8}"
MMA = lower.NAME + " " + REGISTERS + ", {%r7}, {0, 0}, {%r8}, {0, 0};"


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    compiler, cutlass = os.environ.get("CXX") or shutil.which("c++"), setup.cutlass_include()
    if not (compiler and cutlass and setup.CUDA_HOME):
        pytest.skip("no C++ compiler, CUTLASS's or CUDA's headers")
    library = tmp_path_factory.mktemp("cpp") / "sm120.so"
    folders = cutlass, f"{setup.CUDA_HOME}/include", f"{setup.CUDA_HOME}/include/cccl"
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", *(f"-I{folder}" for folder in folders)]
    subprocess.run([compiler, *flags, ROOT / "tests/cpp/sm120.cpp", "-o", library], check=True)
    functions = ctypes.CDLL(str(library))
    functions.tokens_of_tile.argtypes = [ctypes.c_int64] * 2
    return functions


@pytest.mark.parametrize("what", ["codes_of_a", "codes_of_b", "scales_of_a", "scales_of_b", "sums"])
def test_every_value_is_held_where_cute_says(what, functions):
    assert getattr(functions, what)() == 0


def test_the_smallest_tile_that_holds_an_experts_rows_is_chosen(functions):
    for rows in (1, 31, 32, 33, 64, 65, 128, 129, 5000):
        want = 32 if rows <= 32 else 64 if rows <= 64 else 128
        assert functions.tokens_of_tile(7 * rows, 7) == want
    assert functions.tokens_of_tile(40, 384) == 32  # a row each, most experts none
    assert functions.tokens_of_tile(8 * 64 + 1, 8) == 128  # spread evenly, one of them has 65
    assert functions.tokens_of_tile(0, 8) == functions.tokens_of_tile(8, 0) == 32


def test_the_instruction_becomes_a_call():
    text, counts = lower.lower(".target sm_120a\n" + MMA)
    assert counts == {"mma.sync": 1} and "mma" not in text.replace("emulate_mma_sync", "")
    assert text.startswith(".target sm_90a\n")
    given = [line.split("], ")[1] for line in text.splitlines() if line.startswith("st.param")]
    assert given == [
        f"%{r};" for r in ["r1", "r2", "r3", "r4", "r5", "r6", "f5", "f6", "f7", "f8", "r7", "r8"]
    ]
    assert "ld.param.v4.b32 {%f1, %f2, %f3, %f4}, [q];" in text


def test_selectors_that_the_emulation_does_not_know_are_refused():
    with pytest.raises(AssertionError, match="selectors"):
        lower.lower(MMA.replace("{0, 0};", "{0, 1};"))


def test_what_is_not_known_is_left_for_ptxas_to_refuse():
    unknown = MMA.replace("ue4m3", "ue8m0")
    assert lower.lower(unknown) == (unknown, {"mma.sync": 0})

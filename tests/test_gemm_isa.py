"""The CPU's grouped GEMM on every instruction set this machine runs, not only the best."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import lively, poison, ragged_offsets, random_sf, random_weights
from compare import assert_gemm, assert_same_bits

from nvfp4_moe import reference

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("avx512bf16", "avx2", "portable")  # best first, as enum Isa


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("cpp") / "gemm.so"
    sources = [ROOT / "tests/cpp/gemm.cpp", *(ROOT / "csrc/kernels/cpu").glob("gemm*.cpp")]
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, *sources, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(params=ISAS)
def gemm(request, kernels):
    """gemm(a, weights, offsets) on one instruction set."""
    isa = ISAS.index(request.param)
    if isa < kernels.best_isa():
        pytest.skip(f"this processor has no {request.param}")

    def run(a, w, offsets):
        (E, N, _), (R, K) = w.b.shape, a.shape
        poison((R, N), torch.bfloat16)
        tensors = [a.contiguous(), w.b, w.b_sf, w.alpha, offsets, torch.empty(R, N, dtype=torch.bfloat16)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        kernels.gemm(isa, *pointers, *map(ctypes.c_int64, (R, N, K, E)))
        return tensors[-1]

    return run


@pytest.mark.parametrize(
    "R, N, K, E", [(1, 7, 16, 1), (9, 130, 1040, 4), (70, 96, 2064, 2), (300, 50, 48, 3)], ids=str
)
def test_is_within_the_bound_and_a_row_keeps_its_bits_alone(gemm, R, N, K, E):
    w, a, offsets = random_weights(E, N, K), lively(R, K, dtype=torch.bfloat16), ragged_offsets(R, E)
    got = gemm(a, w, offsets)
    for e in range(E):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        assert_gemm(got[rows], a[rows], w.dequantized(e), w.alpha[e], what=f"expert {e}")
    for r in range(0, R, 11):
        assert_same_bits(gemm(a[r : r + 1], w, (offsets > r).int())[0], got[r], f"row {r}")


def test_one_hot_activations_give_the_weights_back(gemm):
    w = random_weights(1, 40, 144)
    w.sf, w.alpha = random_sf(1, 40, 9), torch.ones(1)
    got = gemm(torch.eye(144).bfloat16(), w, torch.tensor([0, 144], dtype=torch.int32))
    assert torch.equal(got.T, reference.dequantize(w.b[0], w.sf[0], torch.ones(()), torch.bfloat16))

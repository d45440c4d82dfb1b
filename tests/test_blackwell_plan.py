"""Blackwell's tile table: the model behind it does what it says. Nothing here was ever timed."""

import ctypes
import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
SIZES = [ctypes.c_int64] * 4
LAYERS = [
    (4096, 7168, 48),
    (1536, 2048, 128),
    (5760, 2880, 128),
    (28672, 4096, 8),
]  # N, K, E of common models


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("cpp") / "plan.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, ROOT / "tests/cpp/plan.cpp", "-o", library], check=True)
    functions = ctypes.CDLL(str(library))
    functions.chosen.argtypes = SIZES
    functions.cycles.argtypes = functions.bound.argtypes = [ctypes.c_int, *SIZES]
    functions.cycles.restype, functions.bound.restype = ctypes.c_double, ctypes.c_char_p
    return functions


def test_every_tile_of_the_table_is_compiled_and_no_other(plan):
    table = {(plan.tokens(i), plan.sms(i), plan.cluster(i)) for i in range(plan.tiles())}
    sources = "".join(p.read_text() for p in (ROOT / "csrc/kernels/sm100").glob("tile_*.cu"))
    found = re.findall(r"::kernel<(\d+), (\d+)(?:, (\d+))?>", sources)
    compiled = {(int(tokens), int(sms), int(cluster or sms)) for tokens, sms, cluster in found}
    assert compiled == table and len(table) == plan.tiles()


@given(
    R=st.integers(1, 100_000), N=st.integers(1, 4000), K=st.integers(1, 1000), E=st.integers(1, 512)
)  # fmt: skip
def test_the_chosen_tile_is_the_cheapest_and_the_first_of_equals(plan, R, N, K, E):
    sizes = R, 8 * N, 32 * K, E
    costs = [plan.cycles(i, *sizes) for i in range(plan.tiles())]
    assert plan.chosen(*sizes) == costs.index(min(costs))


@pytest.mark.parametrize("N, K, E", LAYERS)
def test_few_rows_are_bound_by_memory_on_the_smallest_tile(plan, N, K, E):
    for R in (E, 4 * E, 32 * E):
        tile = plan.chosen(R, N, K, E)
        assert plan.tokens(tile) == 64 and plan.bound(tile, R, N, K, E) == b"memory", R
        floor = E * N * K * 9 / 16 / 8e12 * 1.85e9  # the weights
        assert floor < plan.cycles(tile, R, N, K, E) < 1.1 * floor + 2 * 1500


@pytest.mark.parametrize("N, K, E", LAYERS)
def test_one_row_leaves_sms_idle_and_is_bound_by_what_feeds_the_others(plan, N, K, E):
    assert plan.bound(plan.chosen(1, N, K, E), 1, N, K, E) in (b"what L2 gives an SM", b"memory")


@pytest.mark.parametrize("N, K, E", LAYERS)
def test_many_rows_run_on_the_largest_tile_near_the_peak(plan, N, K, E):
    R = 4096 * E
    tile = plan.chosen(R, N, K, E)
    assert (plan.tokens(tile), plan.cluster(tile)) == (256, 4)
    assert plan.bound(tile, R, N, K, E) != b"memory"
    peak = 2 * R * N * K / 9e15 * 1.85e9
    assert 0.98 < plan.cycles(tile, R, N, K, E) / peak < 1.6


@pytest.mark.parametrize("N", [128, 256])
def test_weights_that_give_a_cluster_one_tile_run_without(plan, N):
    assert plan.cluster(plan.chosen(4096 * 8, N, 4096, 8)) < 4


@pytest.mark.parametrize("N, K, E", LAYERS)
def test_more_rows_never_cost_less(plan, N, K, E):
    costs = [plan.cycles(plan.chosen(R, N, K, E), R, N, K, E) for R in range(1, 3000 * E, max(1, 7 * E + 1))]
    assert all(b >= 0.99 * a for a, b in pairwise(costs))

"""The Blackwell library on a Hopper, through the real operators: BLACKWELL_LIBRARY names what build.py built,
and NVFP4_LIBRARY a libnvfp4.so without chip libraries beside it. README.md says what this proves."""

import ctypes
import os

import pytest
import torch
from cases import epilogue_steps, lively, ragged_offsets, random_sf, random_weights
from compare import assert_close_layers, assert_gemm, assert_same_bits
from test_gemm import check_groups

from nvfp4_moe import formats, ops, reference

LIBRARY = os.environ.get("BLACKWELL_LIBRARY")
TILES = ["128x64", "128x128", "128x256", "256x256 on two SMs", "two of them in a cluster"]
# R, N, K, E: one value; ragged in every direction; many experts and empty ones; more than an atom of scales,
# more than a stage of K (256) and several tiles of N
SHAPES = [(1, 8, 32, 1), (70, 136, 96, 3), (37, 264, 288, 16), (300, 136, 544, 2), (600, 520, 256, 2)]
SM120 = bool(LIBRARY and "sm120" in LIBRARY)
if SM120:
    TILES = ["128x32", "128x64", "128x128"]
    SHAPES += [(700, 4104, 96, 5), (300, 4104, 608, 40), (33, 264, 2880, 3)]  # many tiles, many stages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (LIBRARY and torch.cuda.is_available()), reason="no BLACKWELL_LIBRARY on a GPU"),
]


@pytest.fixture(scope="module")
def chip():
    return ctypes.CDLL(LIBRARY)


@pytest.fixture(params=range(len(TILES)), ids=TILES)
def tile(request, chip):
    """Every call runs on this tile, and comes to the library under test."""
    chosen, calls = (
        ctypes.c_int.in_dll(chip, "blackwell_tile"),
        ctypes.c_int64.in_dll(chip, "blackwell_calls"),
    )
    chosen.value, before = request.param, calls.value
    yield request.param
    chosen.value = -1
    assert calls.value > before, "another kernel ran"


def poison():
    """NaN in the memory that outputs and workspaces will get."""
    for size in (1 << 12, 1 << 18, 1 << 22, 1 << 26):
        blocks = [torch.full((size,), 0x7F, dtype=torch.uint8, device="cuda") for _ in range(4)]
    del blocks


def quantized(R, K, per_row=True):
    x = lively(R, K)
    if per_row:
        return reference.quantize_rows(x)
    scale = reference.tensor_scale(x)
    return *reference.quantize(x, scale), scale


def run(a, w, offsets, bias=None):
    args = (*a, w.b, w.b_sf, w.alpha, offsets, bias)
    poison()
    return ops.grouped_gemm(*(t if t is None else t.cuda() for t in args)).cpu()


def check(a, w, offsets, bias=None):
    got = run(a, w, offsets, bias)
    check_groups(got, reference.dequantize(*a[:2], torch.ones(())), w, offsets, a[2], bias)
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_grouped_product_is_within_the_bound(shape, tile):
    R, N, K, E = shape
    for alphas, bias, per_row in ((1, False, True), (2, True, False)):
        w = random_weights(E, N, K, alphas)
        check(
            quantized(R, K, per_row or R == 1), w, ragged_offsets(R, E), torch.randn(E, N) if bias else None
        )


def test_rows_of_no_expert_are_zero_and_all_experts_may_be_empty(tile):
    w, a = random_weights(3, 24, 64), quantized(20, 64)
    for offsets in ([0, 0, 0, 0], [20, 20, 20, 20], [0, 5, 5, 9], [3, 3, 8, 8]):
        check(a, w, torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("E", [1, 31, 257, 512])
def test_any_number_of_experts(E, tile):
    check(quantized(90, 64), random_weights(E, 16, 64), ragged_offsets(90, E))


@pytest.mark.parametrize(
    "offsets", [[0, 3, 2, 8], [-5, 2, 100, 3], [8, 5, 3, 0], [2**31 - 1, -(2**31), 0, 5]], ids=str
)
def test_offsets_that_lie_never_leave_the_buffers(offsets, tile):
    got = run(quantized(8, 64), random_weights(3, 40, 64), torch.tensor(offsets, dtype=torch.int32))
    assert not got.isnan().any()


def test_random_shapes(tile):
    draw = lambda low, high: int(torch.randint(low, high, ()))  # noqa: E731
    for _ in range(12):
        R, N, K, E = draw(0, 150), 8 * draw(1, 40), 32 * draw(1, 12), draw(1, 12)
        w = random_weights(E, N, K, draw(1, 3))
        check(quantized(R, K), w, ragged_offsets(R, E), torch.randn(E, N) if draw(0, 2) else None)


def test_one_hot_activations_give_the_weights_back_bit_for_bit(tile):
    N, K = 136, 320
    w, sf = random_weights(1, N, K), random_sf(1, N, K // 16)
    ones = torch.ones(K, K // 16).to(torch.float8_e4m3fn)
    a = (formats.pack(2 * torch.eye(K, dtype=torch.uint8)), ones, torch.ones(()))  # code 2 is 1
    args = (*a, w.b, reference.remap_sf(sf), torch.ones(1), torch.tensor([0, K], dtype=torch.int32))
    got = ops.grouped_gemm(*(t.cuda() for t in args)).cpu()
    assert torch.equal(got.T, reference.dequantize(w.b[0], sf[0], torch.ones(()), torch.bfloat16))


def test_every_step_of_the_epilogue_is_rounded_in_the_contracts_order(tile):
    for a, w, offsets, bias, want in epilogue_steps():
        assert torch.equal(run(a, w, offsets, bias), want)


def test_a_nan_scale_reaches_its_own_row_of_weights_only(tile):
    w, a = random_weights(2, 40, 96), quantized(20, 96)
    w.sf.view(torch.uint8)[1, 7, 5] = 0x7F
    got = check(a, w, torch.tensor([0, 9, 20], dtype=torch.int32))
    assert got.isnan().sum() == 11


@pytest.mark.skipif(not SM120, reason="CUTLASS multiplies what the padding holds")
@pytest.mark.parametrize("beyond", ["rows", "columns"])
def test_nan_in_the_padding_of_the_scales_changes_nothing(beyond, tile):
    w, a, offsets = random_weights(2, 136, 352), quantized(40, 352), ragged_offsets(40, 2)
    sf = w.b_sf
    row, column = formats.sf_coord(torch.arange(sf.shape[1]), 22)
    sf.view(torch.uint8)[:, row >= 136 if beyond == "rows" else column >= 22] = 0x7F
    args = (*a, w.b, sf, w.alpha, offsets)
    assert_same_bits(ops.grouped_gemm(*(t.cuda() for t in args)).cpu(), run(a, w, offsets))


def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(tile):
    w, a, offsets = (
        random_weights(2, 72, 288),
        quantized(140, 288),
        torch.tensor([0, 131, 140], dtype=torch.int32),
    )
    together = run(a, w, offsets)
    for r in (0, 130, 139):
        alone = run(tuple(t[r : r + 1] for t in a), w, (offsets > r).int())
        assert_same_bits(alone[0], together[r], f"row {r}")


@pytest.mark.parametrize("alphas", ["one", "a row"])
def test_linear(alphas, tile):
    N, K = 136, 224
    w, x = random_weights(1, N, K), lively(33, K, dtype=torch.bfloat16)
    alpha = torch.rand(N) * 0.01 + 1e-3 if alphas == "a row" else torch.tensor(0.01)
    bias = torch.randn(N) if alphas == "a row" else None
    args = (x, w.b[0], w.b_sf[0], alpha, "nvfp4", bias)
    got = ops.linear(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in args)).cpu()
    packed, sf, scale = reference.quantize_rows(x)
    assert_gemm(got, reference.dequantize(packed, sf, torch.ones(())), w.dequantized(0), alpha, scale, bias)


@pytest.mark.parametrize("act", ["silu", "swiglu_limit", "swiglu_oai", "relu2"])
def test_a_whole_layer_is_the_cpus(act, tile):
    T, H, I, E, k = 40, 96, 64, 4, 2
    gates = 1 if act == "relu2" else 2
    w13, w2 = random_weights(E, gates * I, H, gates), random_weights(E, H, I)
    weights, ids = reference.route(torch.randn(T, E + 2), None, k, "softmax", 1, 1, True, 1.0)
    experts = (w13.b, w13.b_sf, w13.alpha * 64, w2.b, w2.b_sf, w2.alpha * 64)
    args = (lively(T, H, dtype=torch.bfloat16), ids, weights, *experts, 1, "nvfp4", act, 1.702, 7.0)
    got = torch.ops.nvfp4.moe(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in args))
    assert_close_layers(got, torch.ops.nvfp4.moe(*args), act)


def test_a_captured_product_follows_its_routing(tile):
    w, a = random_weights(5, 40, 96), quantized(60, 96)
    args = [t.cuda() for t in (*a, w.b, w.b_sf, w.alpha, ragged_offsets(60, 5))]
    ops.grouped_gemm(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.grouped_gemm(*args)
    for seed in range(3):
        torch.manual_seed(seed)
        offsets = ragged_offsets(60, 5)
        args[-1].copy_(offsets)
        graph.replay()
        check_groups(out.cpu(), reference.dequantize(*a[:2], torch.ones(())), w, offsets, a[2])


def test_the_model_picks_a_tile_by_itself(chip):
    calls = ctypes.c_int64.in_dll(chip, "blackwell_calls")
    before = calls.value
    for R in (4, 400):
        check(quantized(R, 96), random_weights(2, 136, 96), ragged_offsets(R, 2))
    assert calls.value == before + 2
    assert TILES[0] in ops.gemm_plan(4, 4096, 4096, 8, "nvfp4")


def test_what_it_does_not_take_goes_to_the_kernel_of_every_chip(chip):
    """K not a multiple of 32, N not of 8, BF16 activations: no silent change of numbers."""
    calls = ctypes.c_int64.in_dll(chip, "blackwell_calls")
    before = calls.value
    for N, K in ((24, 48), (20, 64)):
        check(quantized(9, K), random_weights(2, N, K), ragged_offsets(9, 2))
        assert "mma.sync" in ops.gemm_plan(9, N, K, 2, "nvfp4")
    w, a, offsets = random_weights(2, 24, 64), lively(9, 64, dtype=torch.bfloat16), ragged_offsets(9, 2)
    check_groups(run((a, None, None), w, offsets), a, w, offsets)
    assert calls.value == before

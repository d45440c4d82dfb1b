"""Packed weights on Hopper give the bits of the public layout: every tile, every kind of activation, whole
layers."""

import pytest
import torch
from cases import poison, random_sf
from compare import REFUSED, assert_same_bits
from test_sm90 import CASES as PUBLIC_CASES
from test_sm90 import (
    DEVICE,
    ROWS,
    faults_show_in_their_own_test,
    named,
    offsets_of,
    pytestmark,
    ragged,
    tile,
    tokens,
    weights,
)
from test_sm90_moe import biases, layer, tiles

from nvfp4_moe import Nvfp4MoE, Nvfp4Tensor, Router, formats, ops

__all__ = ["faults_show_in_their_own_test", "pytestmark"]  # pytest reads them here

NARROW = (4, 448, 544)  # E, N, K: N % 128 = 64, K % 128 = 32, the layout's least steps
CASES = [(rows, *NARROW) for rows in ROWS] + [c for c in PUBLIC_CASES if c[1] > NARROW[0]]
EMPTY = torch.zeros(0, dtype=torch.float8_e4m3fn, device=DEVICE if torch.cuda.is_available() else "cpu")


def both(w):
    """(b, b_sf) in the public layout and packed; the padding of the scales is poisoned."""
    sf, (N, S) = ops.remap_sf(w.sf), w.sf.shape[1:]
    row, column = (t.to(DEVICE) for t in formats.sf_coord(torch.arange(sf.shape[1]), S))
    sf.view(torch.uint8)[:, (row >= N) | (column >= S)] = 0x7F
    return (w.b, sf), (ops.pack_sm90(w.b, sf), EMPTY)


def any_scales(w):
    """All that a scale may be, one in a hundred a NaN."""
    sf = random_sf(*w.sf.shape).view(torch.uint8)
    w.sf = torch.where(torch.rand(sf.shape) < 0.01, 0x7F, sf).view(torch.float8_e4m3fn).to(DEVICE)
    return w


def test_the_cases_reach_every_tile_of_the_table():
    table = {
        tile(rows, E, N, 256) for rows in range(1, 520) for E in (1, 8, 64, 512) for N in (128, 1024, 16384)
    }
    assert {tile(*c) for c in CASES} == table


@pytest.mark.parametrize("case", CASES, ids=named)
class TestEveryTile:
    @pytest.mark.parametrize("alphas", [1, 2])
    @pytest.mark.parametrize("kind", ["bf16", "codes"])
    @pytest.mark.parametrize("scales", ["usual", "any"])
    def test_grouped_gemm(self, case, kind, alphas, scales):
        rows, E, N, K = case
        w, x, offsets = weights(E, N, K, alphas), tokens(rows * E, K), offsets_of(ragged(rows, E))
        w = any_scales(w) if scales == "any" else w
        a = (x, None, None) if kind == "bf16" else ops.quantize_rows(x)
        bias = torch.randn(E, N, device=DEVICE) if alphas == 2 else None
        public, packed = both(w)
        want = ops.grouped_gemm(*a, *public, w.alpha, offsets, bias)
        poison((rows * E, N), torch.bfloat16, DEVICE)
        got = ops.grouped_gemm(*a, *packed, w.alpha, offsets, bias)
        assert_same_bits(got, want.cpu(), f"tile {tile(*case)}")

    @pytest.mark.parametrize("compute", ops.COMPUTES)
    def test_linear_with_an_alpha_for_each_row(self, case, compute):
        rows, _, N, K = case
        w, x, bias = weights(1, N, K), tokens(rows, K), torch.randn(N, device=DEVICE)
        alpha = torch.rand(N, device=DEVICE) * 0.01 + 1e-3
        (b, sf), (packed, _) = both(w)
        want = ops.linear(x, b[0], sf[0], alpha, compute, bias)
        assert_same_bits(ops.linear(x, packed[0], EMPTY, alpha, compute, bias), want.cpu())


@pytest.mark.parametrize("K", [32, 64, 96, 128, 160, 256, 288, 1056, 7168])
@pytest.mark.parametrize("N", [64, 128, 192, 320, 2112])
@pytest.mark.parametrize("rows", [1, 14, 130, 150])
def test_sizes_that_no_tile_divides(rows, N, K):
    w, a, offsets = weights(2, N, K), tokens(2 * rows, K), offsets_of([rows, rows])
    public, packed = both(w)
    want = ops.grouped_gemm(a, None, None, *public, w.alpha, offsets)
    assert_same_bits(ops.grouped_gemm(a, None, None, *packed, w.alpha, offsets), want.cpu())


# T, k, E, H, I; the last three: I no multiple of 64, gate and up meet inside a block; and of a tile
LAYERS = [(T, 4, 8, 576, 256) for T in (1, 5, 16, 33, 80, 150, 300)] + [
    (T, 4, 96, 320, 768) for T in (30, 70)
]
LAYERS += [(9, 2, 4, 128, 96), (40, 3, 6, 192, 288), (70, 2, 4, 256, 192)]


def packed_layer(args):
    x, ids, factors, w13, w13_sf, w13_alpha, w2, w2_sf, w2_alpha = args
    w13, w2 = ops.pack_sm90(w13, w13_sf), ops.pack_sm90(w2, w2_sf)
    return [x, ids, factors, w13, EMPTY, w13_alpha, w2, EMPTY, w2_alpha]


@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("size", LAYERS, ids=str)
class TestLayer:
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("act", ops.ACTS)
    def test_has_the_bits_of_the_public_layout(self, size, act, biased, compute):
        if act == "relu2" and size[4] % 64:
            pytest.skip("relu2's w13 has I rows")
        args, more = layer(*size, act), (0, compute, act, 1.702, 3.0)
        more += biases(*size[2:], act) if biased else (None, None)
        want = ops.moe(*args, *more)
        assert_same_bits(ops.moe(*packed_layer(args), *more), want.cpu(), tiles(*size))

    def test_a_captured_one_follows_its_routing(self, size, compute):
        args = layer(*size)
        packed = packed_layer(args)
        ops.moe(*packed, 0, compute)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.moe(*packed, 0, compute)
        for _ in range(3):
            args[1].copy_(torch.rand(size[0], size[2]).topk(size[1]).indices.int())
            graph.replay()
            assert_same_bits(out, ops.moe(*args, 0, compute).cpu())


@pytest.mark.parametrize("compute", ops.COMPUTES)
def test_a_packed_module_gives_the_same_bits_and_compiles(compute):
    module = Nvfp4MoE(Router(512, 8, 2), 8, 512, 320, compute=compute)
    parts = [Nvfp4Tensor.quantize(torch.randn(8, *s)) for s in ((320, 512), (320, 512), (512, 320))]
    module = module.load_weights(*parts).to(DEVICE)
    x = tokens(33, 512)
    want = module(x).cpu()
    assert_same_bits(module.pack_()(x), want)
    assert_same_bits(torch.compile(module, fullgraph=True, backend="aot_eager")(x), want)
    assert_same_bits(module.unpack_()(x), want)


def test_nobodys_rows_and_no_rows():
    w, a = weights(4, 128, 96), tokens(8, 96)
    _, packed = both(w)
    assert not ops.grouped_gemm(a, None, None, *packed, w.alpha, offsets_of([0] * 4)).any()
    assert ops.grouped_gemm(a[:0], None, None, *packed, w.alpha, offsets_of([0] * 4)).shape == (0, 128)


def test_more_experts_than_the_kernel_takes_are_refused():
    w = weights(2048, 64, 32)
    _, packed = both(w)
    want = (
        "nvfp4::grouped_gemm: `b` is packed for sm90, got it on a device of compute capability 9.0 that does "
    )
    with pytest.raises(REFUSED, match=want + "not take R = 1, N = 64, K = 32, E = 2048"):
        ops.grouped_gemm(tokens(1, 32), None, None, *packed, w.alpha, offsets_of([1] + [0] * 2047))

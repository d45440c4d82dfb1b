"""Hopper's fused layer: the bits of its composition, and of a token whatever else is in the batch."""

import pytest
import torch
from compare import assert_close_layers, assert_same_bits
from conftest import missing_triton
from test_moe import composed
from test_sm90 import DEVICE, faults_show_in_their_own_test, pytestmark, tile, tokens, weights

from nvfp4_moe import ops

__all__ = ["faults_show_in_their_own_test", "pytestmark"]  # pytest reads them here

SMALL = (4, 8, 544, 256)  # k, E, H, I; H % 64 = 32
WIDE = (4, 96, 288, 768)  # enough weight rows for whole tiles at few tokens
SHARED = (4, 24, 544, 1536)  # CTAs hand on sums of the first product, teams at 100 rows an expert
SIZES = [(T, *SMALL) for T in (1, 5, 16, 33, 80, 150, 300)] + [(T, *WIDE) for T in (30, 70)]
SIZES += [(T, *SHARED) for T in (54, 600)]
NARROW = (4, 24, 1568, 1536)  # CTAs hand on sums of both products, which narrow tiles compute in one launch
PAIRS = [(1, *SMALL), (30, *WIDE), (20, *NARROW)]
SIZES += PAIRS[2:]
ODD = [(9, 2, 4, 96, 48), (40, 3, 6, 160, 288), (70, 2, 4, 256, 192)]  # I no multiple of 64, or of a tile
ACTS = ("silu", "swiglu_limit", "swiglu_oai")


def layer(T, k, E, H, I, act="silu"):
    """x, ids, weights, experts of ops.moe; gate and up reach beyond a limit of 3, alphas far apart."""
    halves = 1 if act == "relu2" else 2
    w13, w2 = weights(E, halves * I, H, halves), weights(E, H, I)
    w13.alpha *= 16
    if halves == 2:
        w13.alpha[:, 1] *= 3
    ids = torch.rand(T, E).topk(k).indices.int().to(DEVICE)
    experts = (w13.b, ops.remap_sf(w13.sf), w13.alpha, w2.b, ops.remap_sf(w2.sf), w2.alpha)
    return [torch.randn(T, H).bfloat16().to(DEVICE), ids, torch.rand(T, k).to(DEVICE), *experts]


def biases(E, H, I, act="silu"):
    halves = 1 if act == "relu2" else 2
    return torch.randn(E, halves * I, device=DEVICE), torch.randn(E, H, device=DEVICE)


def tiles(T, k, E, H, I) -> str:
    rows = -(-T * k // E)
    return f"tiles {tile(rows, E, 2 * I, H)}, {tile(rows, E, H, I)}"


@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("size", SIZES + ODD, ids=str)
class TestLayer:
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("act", ops.ACTS)
    def test_equals_its_composition_bit_for_bit(self, size, act, biased, compute):
        args = (*layer(*size, act), 0, compute, act, 1.702, 3.0)
        args += biases(*size[2:], act) if biased else (None, None)
        assert_same_bits(ops.moe(*args), composed(*args).cpu(), tiles(*size))

    @pytest.mark.parametrize("act", ACTS)
    def test_is_close_to_the_cpus(self, size, act, compute):
        if size[2] * size[3] * size[4] > 8e6:
            pytest.skip("minutes of a CPU")
        args = (*layer(*size, act), 0, compute, act, 1.702, 3.0, *biases(*size[2:], act))
        want = ops.moe(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in args))
        assert_close_layers(ops.moe(*args), want, tiles(*size))

    def test_runs_are_bitwise_equal(self, size, compute):
        args = (*layer(*size), 0, compute)
        first = ops.moe(*args).cpu()
        for i in range(5):
            assert_same_bits(ops.moe(*args), first, f"run {i + 2}, {tiles(*size)}")


@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("shape", [SMALL, WIDE, NARROW], ids=str)
def test_a_token_has_the_same_bits_in_every_batch(shape, compute):
    x, ids, factors, *experts = layer(300, *shape)
    run = lambda t: ops.moe(x[t], ids[t], factors[t], *experts, 0, compute)  # noqa: E731
    whole = run(slice(None)).cpu()
    for t in (0, 1, 150, 299):
        assert_same_bits(run(slice(t, t + 1))[0], whole[t], f"token {t} alone")
    for T in (2, 5, 9, 16, 33, 60, 80, 130, 150, 220):
        for first in (0, 300 - T):
            batch = slice(first, first + T)
            assert_same_bits(run(batch), whole[batch], f"tokens {first} to {first + T}, {tiles(T, *shape)}")
    order = torch.randperm(300)
    assert_same_bits(run(order.to(DEVICE)), whole[order], "in another order")


@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("size", [*((T, *SMALL) for T in (1, 33, 200)), (20, *NARROW)], ids=str)
def test_a_captured_layer_follows_its_routing(size, compute):
    T, k, E, H, I = size
    x, ids, factors, *experts = layer(*size)
    args = (x, ids, factors, *experts, 0, compute)
    ops.moe(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.moe(*args)
    drawn = torch.rand(3, T, E).topk(k).indices.int()
    one, nobody = torch.full((T, k), E - 1, dtype=torch.int32), torch.full((T, k), -1, dtype=torch.int32)
    some = torch.where(torch.rand(T, k) < 0.5, drawn[0], nobody)
    for i, routing in enumerate((*drawn, one, nobody, some)):
        ids.copy_(routing)
        x.copy_(tokens(T, H))
        factors.copy_(torch.rand(T, k))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(out, ops.moe(*args).cpu(), f"replay {i}, {tiles(T, k, E, H, I)}")


LAUNCHES = {
    "bf16": ["sort_tile", "order_kernel", "pair_kernel", "combine_kernel"],
    "nvfp4": ["sort_tile", *["quantize_rows_kernel", "grouped_kernel"] * 2, "combine_kernel"],
}


@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("size", [*PAIRS, (80, *SMALL)], ids=str)
def test_few_kernels_are_launched(size, compute):
    args = (*layer(*size), 0, compute)
    ops.moe(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.moe(*args)
        torch.cuda.synchronize()
    events = sorted((e for e in profile.events() if "nvfp4" in e.name), key=lambda e: e.time_range.start)
    want = LAUNCHES[compute]
    if compute == "bf16" and size not in PAIRS:
        want = ["sort_tile", "order_kernel", "grouped_kernel", "grouped_kernel", "combine_kernel"]
    names = [next((w for w in want if w in e.name), e.name) for e in events]
    assert names == want, tiles(*size)


@pytest.mark.parametrize("size", PAIRS, ids=str)
def test_layers_on_several_streams_finish_and_are_right(size):
    """A pair's CTAs wait for each other, and those of three layers meet on the card."""
    calls = [layer(*size) for _ in range(3)]
    want = [ops.moe(*args, 0, "bf16") for args in calls]
    streams, graphs, got = [torch.cuda.Stream() for _ in calls], [], []
    for args, stream in zip(calls, streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got.append(ops.moe(*args, 0, "bf16"))
        graphs.append(graph)
    for replay in range(50):
        for y in got:
            y.fill_(torch.nan)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                graph.replay()
        torch.cuda.synchronize()
        for y, w in zip(got, want, strict=True):
            assert_same_bits(y, w.cpu(), f"replay {replay}")


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
@pytest.mark.parametrize("free", [1, 40])
@pytest.mark.parametrize("size", [*PAIRS, (54, *SHARED)], ids=str)
def test_a_layer_ends_on_a_crowded_card(size, free):
    """Most CTAs come up only when others are done, which therefore must not wait for them."""
    from crowd import crowd  # which imports triton

    args = (*layer(*size), 0, "bf16")
    want, done = ops.moe(*args).cpu(), torch.cuda.Event()
    with crowd(free):
        got = ops.moe(*args)
        done.record()
        done.synchronize()
    assert_same_bits(got, want, tiles(*size))


@pytest.mark.parametrize("compute", ops.COMPUTES)
def test_uneven_experts_share_narrow_tiles(compute):
    """A row more than a tile holds makes two: 128x8, chosen where tiles are few, has sums to hand on."""
    T, k, E, H, I = 120, 1, 24, 640, 320
    rows = torch.tensor([9, 1] * (E // 2))
    ids = torch.arange(E, dtype=torch.int32).repeat_interleave(rows)[torch.randperm(T), None]
    x, _, *rest = layer(T, k, E, H, I)
    args = (x, ids.to(DEVICE), *rest)
    assert tiles(T, k, E, H, I) == "tiles 128x8, 128x8"
    args += (0, compute, "silu", 1.702, 7.0)
    assert_same_bits(ops.moe(*args), composed(*args).cpu(), tiles(T, k, E, H, I))


@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("T", [1, 20, 80, 300])
def test_ids_that_lie_do_not_fault(T, compute):
    k, E, _, _ = SMALL
    x, ids, factors, *experts = layer(T, *SMALL)
    honest = ops.moe(x, ids, factors, *experts, 0, compute)
    lies = torch.randint(-(2**31), 2**31 - 1, (T, k), dtype=torch.int32, device=DEVICE)
    assert not ops.moe(x, lies, factors, *experts, 0, compute).any(), "nobody's tokens are zero"
    lies = torch.randint(-3, E + 3, (T, k), dtype=torch.int32, device=DEVICE)  # duplicates too
    args = (x, lies, factors, *experts, 0, compute, "silu", 1.0, 0.0)
    assert_same_bits(ops.moe(*args), composed(*args).cpu())
    assert_same_bits(ops.moe(x, ids, factors, *experts, 0, compute), honest.cpu(), "afterwards")


@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("T", [3, 40, 300])
def test_nan_tokens_and_nan_weights_stay_with_whom_they_belong(T, compute):
    x, ids, factors, *experts = layer(T, *SMALL)
    run = lambda: ops.moe(x, ids, factors, *experts, 0, compute)  # noqa: E731
    want = run()
    x[0], want[0] = torch.nan, torch.nan
    assert_same_bits(run(), want.cpu(), "a NaN token")
    experts[4].view(torch.uint8)[5, 0] = 0x7F  # w2 of expert 5, output 0, first block
    want[(ids == 5).any(1), 0] = torch.nan
    assert_same_bits(run(), want.cpu(), "a NaN scale in w2")


def test_half_the_experts_here_and_half_elsewhere():
    x, ids, factors, *experts = layer(60, *SMALL)
    for first in (0, 4):
        part = [t[first : first + 4] for t in experts]
        args = (x, ids, factors, *part, first, "bf16", "silu", 1.0, 0.0)
        assert_same_bits(ops.moe(*args), composed(*args).cpu(), f"experts {first} to {first + 4}")

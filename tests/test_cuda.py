"""What only a GPU can show: graph capture, streams, no host sync, several devices, large sizes."""

import gc
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import lively, random_weights
from compare import REFUSED, assert_same_bits
from conftest import missing_gpu
from test_ops import NAMES, outcome, sample_calls, spoil

from nvfp4_moe import Nvfp4MoE, Router, ops, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing_gpu() is not None, reason=str(missing_gpu()))]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def cpu(out):
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


def call(name, args):
    return getattr(torch.ops.nvfp4, name)(*args)


@pytest.mark.parametrize("name", NAMES)
class TestEveryOperator:
    def test_is_captured_and_replays_with_new_inputs(self, name):
        args = sample_calls("cuda")[name]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(name, args)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(name, args)
        torch.manual_seed(1)  # other routing, other values, the same shapes
        fresh = sample_calls("cuda")[name]
        for old, new in zip(args, fresh, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
        graph.replay()
        assert_same_bits(out, cpu(call(name, fresh)), name)

    def test_runs_on_the_current_stream(self, name):
        args = sample_calls("cuda")[name]
        want = cpu(call(name, args))
        side = torch.cuda.Stream()
        blocker = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(
                20
            ):  # milliseconds of work: on another stream the operator would be done before it
                blocker.fill_(1)
            late = [a.clone().zero_() if isinstance(a, torch.Tensor) else a for a in args]
            for to, a in zip(late, args, strict=True):
                if isinstance(a, torch.Tensor):
                    to.copy_(a)
            got = call(name, late)
        side.synchronize()
        assert_same_bits(got, want, name)

    def test_does_not_wait_for_the_device(self, name):
        args = sample_calls("cuda")[name]
        call(name, args)
        blocker = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        done = torch.cuda.Event()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(100):
                blocker.fill_(1)
            call(name, args)
            done.record()
            still_running = not done.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert still_running, f"{name} returned only when the device had finished"
        torch.cuda.synchronize()

    def test_gives_the_cpus_bits(self, name):
        args = sample_calls()[name]
        moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        got, want = call(name, moved), call(name, args)
        if name in ("grouped_gemm", "linear", "moe"):
            # Sums in another order may round to the neighbouring BF16, 2^-7 of it at most, and move one of
            # a layer's many activations to the neighbouring code; twice that, of each output and of the
            # largest. (The products' own bounds are in compare.py.)
            assert torch.equal(got.isnan().cpu(), want.isnan())
            torch.testing.assert_close(
                got.cpu().float(), want.float(), rtol=2**-6, atol=2**-6 * float(want.abs().max())
            )
        else:
            assert_same_bits(got, want, name)

    def test_leaves_no_memory_behind(self, name):
        args = sample_calls("cuda")[name]
        call(name, args)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            call(name, args)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before


def test_views_at_any_offset_work_or_are_refused():
    w = random_weights(2, 24, 64)
    a, offsets = lively(5, 64, dtype=torch.bfloat16), torch.tensor([0, 2, 5], dtype=torch.int32)

    def shifted(t):  # the same values, at an odd place in memory
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")
        room[1:].copy_(t.flatten())
        return room[1:].view(t.shape)

    plain = [t.cuda() for t in (a, w.b, w.b_sf, w.alpha, offsets)]
    want = ops.grouped_gemm(plain[0], None, None, *plain[1:])
    got = ops.grouped_gemm(shifted(a), None, None, *plain[1:3], shifted(w.alpha), shifted(offsets))
    assert_same_bits(got, want.cpu())
    assert_same_bits(ops.quantize_rows(shifted(a)), ops.quantize_rows(a))
    assert_same_bits(ops.swiglu_quantize(shifted(a)), ops.swiglu_quantize(a))
    with pytest.raises(REFUSED, match="`b` must start at a multiple of 8 bytes"):
        ops.grouped_gemm(plain[0], None, None, shifted(w.b), *plain[2:])


def moe_layer(E, H, I, k):
    layer = Nvfp4MoE(Router(H, E, k), E, H, I, device="cpu")
    w13, w2 = random_weights(E, 2 * I, H, 2), random_weights(E, H, I)
    layer.w13, layer.w13_sf, layer.w13_alpha = w13.b, w13.b_sf, w13.alpha
    layer.w2, layer.w2_sf, layer.w2_alpha = w2.b, w2.b_sf, w2.alpha
    layer.router.weight.copy_(torch.randn(E, H))
    return layer.cuda()


def test_a_whole_layer_is_captured_and_follows_its_routing():
    layer = moe_layer(8, 128, 64, 2)
    x = torch.randn(33, 128, device="cuda").bfloat16()
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(33, 128).bfloat16())
        graph.replay()
        assert_same_bits(y, layer(x).cpu())


def test_compiles_with_inductor_on_the_gpu():
    layer = moe_layer(8, 128, 64, 2)
    x = torch.randn(33, 128, device="cuda").bfloat16()
    weights, ids = layer.router(x)
    compiled = torch.compile(lambda x: ops.moe(x, ids, weights, *experts(layer)), fullgraph=True)
    assert_same_bits(compiled(x), ops.moe(x, ids, weights, *experts(layer)).cpu())


def experts(layer):
    return layer.w13, layer.w13_sf, layer.w13_alpha, layer.w2, layer.w2_sf, layer.w2_alpha


@pytest.mark.parametrize(
    "T, E, k", [(65536, 1024, 32), (16384, 384, 6), (64, 256, 8), (1, 1024, 32)], ids=str
)
def test_routing_of_many_tokens_has_the_cpus_bits(T, E, k):
    logits = (torch.randn(T, E) * 2).round(decimals=1)
    weights, ids = ops.route(logits, None, k)
    got = ops.route(logits.cuda(), None, k)
    assert_same_bits(got, (weights, ids))
    for first, local in ((0, E), (E // 4, E // 2)):
        assert_same_bits(ops.permute(ids.cuda(), local, first), ops.permute(ids, local, first))


FOLLOWERS = {  # small kernels on what route writes: float32 weights and int32 ids, both [64, 32]
    "permute": lambda weights, ids: ops.permute(ids, 4096, 0),
    "route": lambda weights, ids: ops.route(weights, None, 4),
    "combine": lambda weights, ids: ops.combine(weights.view(torch.bfloat16).view(-1, 8), ids, weights),
    "tensor_scale": lambda weights, ids: ops.tensor_scale(weights),
    "quantize": lambda weights, ids: ops.quantize(weights, weights[0, 0]),
    "quantize_rows": lambda weights, ids: ops.quantize_rows(weights),
    "dequantize": lambda weights, ids: ops.dequantize(
        weights.view(torch.uint8), ids[:8].view(torch.float8_e4m3fn).view(64, 16), weights[0, 0]
    ),
    "swiglu": lambda weights, ids: ops.swiglu(weights.view(torch.bfloat16)),
    "swiglu_quantize": lambda weights, ids: ops.swiglu_quantize(weights.view(torch.bfloat16)),
    "remap_sf": lambda weights, ids: ops.remap_sf(weights.view(torch.float8_e4m3fn)),
    "unmap_sf": lambda weights, ids: ops.unmap_sf(weights.view(-1).view(torch.float8_e4m3fn), 512, 16),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_small_kernels_wait_for_the_one_before(name):
    """They are launched early, while a route of 4096 experts still runs (tens of microseconds on 64 of the
    multiprocessors). In a graph's replay one that did not wait would read what the last replay left."""
    logits = torch.randn(64, 4096, device="cuda")
    route = lambda: ops.route(logits, None, 32)  # noqa: E731
    FOLLOWERS[name](*route())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = route()
        got = FOLLOWERS[name](weights, ids)
    for _ in range(5):
        logits.copy_(torch.randn(logits.shape))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(got, cpu(FOLLOWERS[name](weights, ids)), name)


@pytest.mark.parametrize("R, K", [(3, 32768), (5000, 7168), (65536, 64), (1, 16)], ids=str)
def test_wide_and_tall_activations_have_the_cpus_bits(R, K):
    x = lively(R, K, dtype=torch.bfloat16)
    assert_same_bits(ops.quantize_rows(x.cuda()), ops.quantize_rows(x))
    if K % 32 == 0:
        assert_same_bits(ops.swiglu_quantize(x.cuda()), ops.swiglu_quantize(x))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_short_sequences_of_the_gpu_are_exact_for_every_input(tmp_path):
    """Reciprocal, square root, amax / 6, e4m3: against IEEE's operations and the portable formulas."""
    major, minor = torch.cuda.get_device_capability()
    flags = ["-std=c++20", "-O2", "--fmad=false", f"-arch=sm_{major}{minor}"]
    program = tmp_path / "exact"
    subprocess.run(["nvcc", *flags, Path(__file__).parent / "cpp/exact.cu", "-o", program], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    names = ("reciprocal", "sqrt", "sixth", "sixth16", "e4m3_encode", "e4m3_decode")
    assert lines == [f"{name} 0" for name in names]


def test_scores_of_a_million_logits_have_the_cpus_bits():
    x = torch.cat([torch.linspace(-110, 110, 1 << 20), torch.randn(1 << 20)])[:, None]
    for score in ("sigmoid", "sqrt_softplus"):
        args = (None, 1, score, 1, 1, False, 1.0)
        assert_same_bits(ops.route(x.cuda(), *args), ops.route(x, *args))


@pytest.mark.parametrize("act", ops.ACTS)
def test_activations_of_every_gate_have_the_cpus_bits(act):
    """All 2^16 of them, beside their like, one far away, alone among near: with exp's ends and without."""
    gate = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)

    def among(other, every):
        x = torch.full((2**16, every), other, dtype=torch.bfloat16)
        x[:, every // 2] = gate
        return x.view(-1, 64)

    rare = (-0.3, 1e30), (1e3, -2.0), (1e-30, torch.inf), (0.0, 3.0)
    rare += (torch.nan, torch.nan), (torch.nan, 7.0), (torch.inf, 7.0)
    for gates in (gate.view(-1, 64), among(1e4, 2), among(-1.0, 16)):
        x = torch.cat([gates, torch.randn(gates.shape).bfloat16()], 1)
        for args in ((1.702, 7.0), (1.702, 50.75), (1.702, 128.0), (1.0, 7.01), *rare):  # exp ends at 50.9
            assert_same_bits(ops.swiglu(x.cuda(), act, *args), ops.swiglu(x, act, *args))
            assert_same_bits(ops.swiglu_quantize(x.cuda(), act, *args), ops.swiglu_quantize(x, act, *args))


def test_ten_thousand_bad_calls_end_in_python_exceptions():
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: int(torch.randint(n, (), generator=generator))  # noqa: E731
    calls = {name: sample_calls("cuda")[name] for name in NAMES}
    hows = ("dtype", "rank", "last", "first", "stride", "drop")
    for _ in range(10_000):
        name = NAMES[draw(len(NAMES))]
        args = calls[name]
        for _ in range(1 + draw(3)):
            args = spoil(args, draw(len(args)), hows[draw(len(hows))])
        outcome(name, args)
    torch.cuda.synchronize()  # and the device is still there
    x = lively(4, 64)
    assert_same_bits(ops.quantize_rows(x.cuda()), reference.quantize_rows(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_operands_device_whichever_is_current(name):
    args = sample_calls()[name]
    on = lambda d: [a.to(d) if isinstance(a, torch.Tensor) else a for a in args]  # noqa: E731
    want = cpu(call(name, on("cuda:0")))
    with torch.cuda.device(0):
        out = call(name, on("cuda:1"))
    assert all(t.device.index == 1 for t in (out if isinstance(out, tuple) else (out,)))
    assert_same_bits(out, want, name)

"""The GPU's small kernels: bandwidth beside a measured copy, routing in us, torch.compile beside both.

Bandwidth: one operator a CUDA graph replay, the graph's launch (about 4 us) included; the median of replays,
each on another of several copies of the inputs, together beyond 4 x L2. Bytes are those the operator must
read and write; % of copy: against torch's device-to-device copy that moves as many, in the same run.
Routing: 20 in a graph, divided by 20; beside it a graph of one, and of one tiny kernel, launch and events
included. torch.compile: the same result's formula written in PyTorch and compiled; n/a where there is none.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import MODELS
from torch import Tensor

from nvfp4_moe import ops

BLOCK, REPLAYS = 16, 30


def replay_microseconds(run: Callable[[tuple], object], inputs: list[tuple]) -> float:
    """Median over replays of one graph an input set; the sets are walked in turn, so each finds a cold L2."""
    stream = torch.cuda.Stream()
    graphs = []
    with torch.cuda.stream(stream):
        for args in inputs:
            run(args)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run(args)
            graphs.append(graph)
        times = []
        for i in range(3 + REPLAYS):
            graph = graphs[i % len(graphs)]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def copies_for(size: int) -> int:
    """Enough sets of inputs that a set has left L2 when its turn comes again."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(16, -(-4 * l2 // max(size, 1))))


def copy_microseconds(size: int) -> float:
    half = size // 2  # a copy of n bytes moves 2 n
    noise = lambda: torch.randint(256, (half,), dtype=torch.uint8, device="cuda")  # noqa: E731
    return replay_microseconds(
        lambda a: a[1].copy_(a[0]), [(noise(), noise()) for _ in range(copies_for(half))]
    )


# ---- what PyTorch would do, for the compiler ------------------------------------------------------------


def torch_swiglu(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).bfloat16()


def torch_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((-1, -2)) / 2688)))
    sf = (blocks.abs().amax(-1) / (6 * scale[:, None])).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    v = blocks / (sf.float() * scale[:, None])[..., None]
    a = v.abs()
    code = (a > 0.25).int() + (a >= 0.75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) + (a > 5)
    code = (code + 8 * torch.signbit(v)).to(torch.uint8).flatten(-2)
    return code[..., ::2] | code[..., 1::2] << 4, sf, scale


def torch_combine(y: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return (y[slots.long()].float() * weights[..., None]).sum(1).bfloat16()


def torch_route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(k)
    return weights / weights.sum(-1, keepdim=True), ids


# ---- the subjects ---------------------------------------------------------------------------------------


def bandwidth_cases(R: int, K: int):
    """name, bytes moved, operator, compiled peer or None, maker of one input set; x is [R, K]."""
    bf16 = lambda *shape: torch.randn(shape, device="cuda").bfloat16()  # noqa: E731
    x, packed, sf = 2 * R * K, R * K // 2, R * K // BLOCK
    quantized = lambda: ops.quantize_rows(bf16(R, K))  # noqa: E731
    one = torch.tensor(0.01, device="cuda")
    yield "quantize", x + packed + sf, lambda a: ops.quantize(*a), None, lambda: (bf16(R, K), one)
    rows = x + packed + sf + 4 * R
    yield "quantize_rows", rows, lambda a: ops.quantize_rows(*a), torch_quantize_rows, lambda: (bf16(R, K),)
    yield "swiglu", x + x // 2, lambda a: ops.swiglu(*a), torch_swiglu, lambda: (bf16(R, K),)
    hidden = x + (packed + sf) // 2 + 4 * R
    swiglu_rows = lambda x: torch_quantize_rows(torch_swiglu(x))  # noqa: E731
    yield "swiglu_quantize", hidden, lambda a: ops.swiglu_quantize(*a), swiglu_rows, lambda: (bf16(R, K),)
    clamped = lambda a: ops.swiglu_quantize(*a, "swiglu_limit", 1.0, 7.0)  # noqa: E731
    yield "  swiglu_limit", hidden, clamped, None, lambda: (bf16(R, K),)
    bytes_ = x + packed + sf + 4 * R
    yield "dequantize", bytes_, lambda a: ops.dequantize(*a, torch.bfloat16), None, quantized
    columns, E = K // BLOCK, 32
    scales = lambda: torch.randint(1, 127, (E, R, columns), dtype=torch.uint8, device="cuda")  # noqa: E731
    remap = lambda: (scales().view(torch.float8_e4m3fn),)  # noqa: E731
    yield "remap_sf", 2 * E * sf, lambda a: ops.remap_sf(*a), None, remap
    yield from pack_cases(R, K)
    yield from mxfp4_cases(R, K)
    T, k = R // 8, 8
    slots = lambda: torch.randperm(R, device="cuda", dtype=torch.int32).view(T, k)  # noqa: E731
    combine = lambda: (bf16(R, K), slots(), torch.rand(T, k, device="cuda"))  # noqa: E731
    yield "combine", x + x // k + 8 * R, lambda a: ops.combine(*a), torch_combine, combine


def pack_cases(R: int, K: int, E: int = 16):
    """E matrices to Hopper's own order and back."""
    u8 = {"dtype": torch.uint8, "device": "cuda"}
    codes = lambda: torch.randint(256, (E, R // E, K // 2), **u8)  # noqa: E731
    scales = lambda: torch.randint(1, 127, (E, R // E, K // BLOCK), **u8)  # noqa: E731
    public = lambda: (codes(), ops.remap_sf(scales().view(torch.float8_e4m3fn)))  # noqa: E731
    packed = lambda: (ops.pack_sm90(*public()), K)  # noqa: E731
    moved = R * K * 9 // 8
    yield "pack_sm90", moved, lambda a: ops.pack_sm90(*a), None, public
    yield "unpack_sm90", moved, lambda a: ops.unpack_sm90(*a), None, packed


def mxfp4_cases(R: int, K: int, E: int = 16):
    """E matrices whose exponents span 12: nothing is lost but by `requantize`."""
    u8 = {"dtype": torch.uint8, "device": "cuda"}
    codes = lambda: torch.randint(256, (E, R // E, K // 2), **u8)  # noqa: E731
    e8m0 = lambda: torch.randint(110, 122, (E, R // E, K // 32), **u8)  # noqa: E731
    moved = R * K * (17 + 18) // 32
    for method in ("best", "requantize"):
        run = lambda a, m=method: ops.mxfp4_to_nvfp4(*a, m)  # noqa: E731
        yield f"mxfp4 {method}", moved, run, None, lambda: (codes(), e8m0())


def measure_bandwidth(R: int, K: int) -> list[dict]:
    results = []
    for name, moved, run, peer, make in bandwidth_cases(R, K):
        inputs = [make() for _ in range(copies_for(moved))]
        row = {"op": name, "shape": f"[{R}, {K}]", "bytes": moved, "us": replay_microseconds(run, inputs)}
        row["copy_us"] = copy_microseconds(moved)
        if peer:
            torch._dynamo.reset()  # one function at many shapes would meet the recompile limit
            compiled = torch.compile(peer, fullgraph=True, dynamic=False)
            row["peer_us"] = replay_microseconds(lambda a, f=compiled: f(*a), inputs)
        results.append(row)
        del inputs
        torch.cuda.empty_cache()
    return results


def in_a_row_microseconds(run: Callable[[tuple], object], inputs: list[tuple], times: int = 20) -> float:
    """Of one call, in a graph that holds `times` of them one after another, as a model's layers would."""

    def chain(_):
        for i in range(times):
            run(inputs[i % len(inputs)])

    return replay_microseconds(chain, [()]) / times


def measure_routing() -> list[dict]:
    results = []
    shapes = [(T, m.experts, m.top_k) for m in MODELS for T in (1, 64)] + [(64, 384, 6), (16384, 384, 6)]
    for T, E, k in shapes:
        inputs = [(torch.randn(T, E, device="cuda"),) for _ in range(4)]

        def both(a, E=E, k=k):
            return ops.permute(ops.route(a[0], None, k)[1], E, 0)

        torch._dynamo.reset()
        compiled = torch.compile(lambda x, k=k: torch_route(x, k), fullgraph=True, dynamic=False)
        results.append(
            {
                "op": "route + permute",
                "shape": f"T={T} E={E} k={k}",
                "us": in_a_row_microseconds(both, inputs),
                "route_us": in_a_row_microseconds(lambda a, k=k: ops.route(a[0], None, k), inputs),
                "alone_us": replay_microseconds(both, inputs),
                "tiny_alone_us": replay_microseconds(lambda a: a[0].view(-1)[:1].add_(0), inputs),
                "peer_us": in_a_row_microseconds(lambda a, f=compiled: f(a[0]), inputs),
            }
        )
    return results


def about() -> dict:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    return {"date": time.strftime("%F"), "gpu, driver, clocks": gpu, "torch": torch.__version__}


def show(bandwidth: list[dict], routing: list[dict]) -> None:
    columns = f"{'us':>8} {'GB/s':>6} {'copy GB/s':>9} {'% of copy':>9} {'torch.compile us':>16}"
    print(f"{'op':<16} {'shape':<16} {columns}")
    for r in bandwidth:
        peer = f"{r['peer_us']:.1f}" if "peer_us" in r else "n/a"
        rates = f"{r['bytes'] / r['us'] / 1e3:>6.0f} {r['bytes'] / r['copy_us'] / 1e3:>9.0f}"
        share = 100 * r["copy_us"] / r["us"]
        print(f"{r['op']:<16} {r['shape']:<16} {r['us']:>8.1f} {rates} {share:>8.0f}% {peer:>16}")
    columns = (
        f"{'us':>7} {'route':>7} {'graph of one':>12} {'of a tiny kernel':>16} {'torch.compile (route)':>21}"
    )
    print(f"\n{'op':<16} {'shape':<22} {columns}")
    for r in routing:
        print(
            f"{r['op']:<16} {r['shape']:<22} {r['us']:>7.1f} {r['route_us']:>7.1f} {r['alone_us']:>12.1f}"
            f" {r['tiny_alone_us']:>16.1f} {r['peer_us']:>21.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warm = torch.randn(8192, 8192, device="cuda").bfloat16()
    for _ in range(200):  # the card idles at a fraction of its clock
        warm @ warm
    torch.cuda.synchronize()
    print(json.dumps(about()))
    bandwidth = measure_bandwidth(65536, 7168) + measure_bandwidth(32768, 4096)
    routing = measure_routing()
    show(bandwidth, routing)
    if args.json:
        report = {**about(), "bandwidth": bandwidth, "routing": routing}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()

"""The GPU's small kernels: bandwidth beside a measured copy, routing in us; torch.compile and vLLM beside.

Bandwidth: one operator a CUDA graph replay, the graph's launch (about 4 us) included; the median of replays,
each on another of several copies of the inputs, together beyond 4 x L2. Bytes are those the operator must
read and write; % of copy: against torch's device-to-device copy that moves as many. Operator, copy and peers
take turns, so that all meet the same clocks. Routing: 20 in a graph, divided by 20; beside it a graph of one,
and of one tiny kernel, launch and events included. Peers (peers_elementwise.py): the same result's formula
written in PyTorch and compiled; vLLM's kernel where its libraries are on the path; n/a where there is none.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import peers_elementwise as peers
import torch
from cases import MODELS

from nvfp4_moe import ops

BLOCK, WARM_UPS, REPLAYS = 16, 5, 30
Run = tuple[Callable[[tuple], object], list[tuple]]  # a call and the input sets that its replays walk


def graphs_of(run: Callable[[tuple], object], inputs: list[tuple], stream) -> list[torch.cuda.CUDAGraph]:
    """One an input set, so that each replay finds a cold L2."""
    graphs = []
    for args in inputs:
        run(args)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run(args)
        graphs.append(graph)
    return graphs


def replay_microseconds(runs: dict[str, Run]) -> dict[str, float]:
    """Medians over replays, taken in turns."""
    stream = torch.cuda.Stream()
    times = {name: [] for name in runs}
    with torch.cuda.stream(stream):
        graphs = {name: graphs_of(*run, stream) for name, run in runs.items()}
        for i in range(WARM_UPS + REPLAYS):
            for name, its in graphs.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                its[i % len(its)].replay()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(t[WARM_UPS:]) for name, t in times.items()}


def copies_for(size: int) -> int:
    """Enough sets of inputs that a set has left L2 when its turn comes again."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(16, -(-4 * l2 // max(size, 1))))


def copy_of(size: int) -> Run:
    half = size // 2  # a copy of n bytes moves 2 n
    noise = lambda: torch.randint(256, (half,), dtype=torch.uint8, device="cuda")  # noqa: E731
    return lambda a: a[1].copy_(a[0]), [(noise(), noise()) for _ in range(copies_for(half))]


def peers_of(call: tuple, inputs: list[tuple], compiled=None, vllm=None) -> dict[str, Run | str]:
    """The peers that can be called, and why the others cannot."""
    found: dict[str, Run | str] = {}
    if compiled:
        torch._dynamo.reset()  # one function at many shapes would meet the recompile limit
        f = torch.compile(compiled, fullgraph=True, dynamic=False)
        found["torch.compile"] = (lambda a: f(*a, *call), inputs)
    if vllm:
        try:
            vllm(*inputs[0], *call)
            found["vLLM"] = (lambda a: vllm(*a, *call), inputs)
        except Exception as error:  # a peer must not stop ours
            found["vLLM"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


# ---- the subjects ---------------------------------------------------------------------------------------


def bandwidth_cases(R: int, K: int):
    """name, bytes moved, operator, maker of one input set, peers; x is [R, K]."""
    bf16 = lambda *shape: torch.randn(shape, device="cuda").bfloat16()  # noqa: E731
    x, packed, sf = 2 * R * K, R * K // 2, R * K // BLOCK
    rows = lambda: (bf16(R, K),)  # noqa: E731
    one = torch.tensor(0.01, device="cuda")
    yield "quantize", x + packed + sf, ops.quantize, lambda: (bf16(R, K), one), {"compiled": peers.quantize}
    moved = x + packed + sf + 4 * R
    yield "quantize_rows", moved, ops.quantize_rows, rows, {"compiled": peers.quantize_rows}
    swiglu = {"compiled": peers.swiglu, "vllm": peers.vllm_swiglu}
    yield "swiglu", x + x // 2, ops.swiglu, rows, swiglu
    moved = x + (packed + sf) // 2 + 4 * R
    yield "swiglu_quantize", moved, ops.swiglu_quantize, rows, {"compiled": peers.swiglu_quantize}
    limit = lambda x: ops.swiglu_quantize(x, "swiglu_limit", 1.0, 7.0)  # noqa: E731
    yield "  swiglu_limit", moved, limit, rows, {"compiled": peers.swiglu_limit_quantize}
    oai = lambda x: ops.swiglu_quantize(x, "swiglu_oai", 1.702, 7.0)  # noqa: E731
    yield "  swiglu_oai", moved, oai, rows, {}
    dequantize = lambda *a: ops.dequantize(*a, torch.bfloat16)  # noqa: E731
    quantized = lambda: ops.quantize_rows(bf16(R, K))  # noqa: E731
    moved = x + packed + sf + 4 * R
    yield "dequantize", moved, dequantize, quantized, {"compiled": peers.dequantize}
    columns, E = K // BLOCK, 32
    scales = lambda: torch.randint(1, 127, (E, R, columns), dtype=torch.uint8, device="cuda")  # noqa: E731
    remap = lambda: (scales().view(torch.float8_e4m3fn),)  # noqa: E731
    yield "remap_sf", 2 * E * sf, ops.remap_sf, remap, {"compiled": peers.remap_sf}
    yield from pack_cases(R, K)
    yield from mxfp4_cases(R, K)
    T, k = R // 8, 8
    slots = lambda: torch.randperm(R, device="cuda", dtype=torch.int32).view(T, k)  # noqa: E731
    combine = lambda: (bf16(R, K), slots(), torch.rand(T, k, device="cuda"))  # noqa: E731
    combined = {"compiled": peers.combine, "vllm": peers.vllm_combine}
    yield "combine", x + x // k + 8 * R, ops.combine, combine, combined


def pack_cases(R: int, K: int, E: int = 16):
    """E matrices to Hopper's own order and back."""
    u8 = {"dtype": torch.uint8, "device": "cuda"}
    codes = lambda: torch.randint(256, (E, R // E, K // 2), **u8)  # noqa: E731
    scales = lambda: torch.randint(1, 127, (E, R // E, K // BLOCK), **u8)  # noqa: E731
    public = lambda: (codes(), ops.remap_sf(scales().view(torch.float8_e4m3fn)))  # noqa: E731
    packed = lambda: (ops.pack_sm90(*public()), K)  # noqa: E731
    moved = R * K * 9 // 8
    yield "pack_sm90", moved, ops.pack_sm90, public, {}
    yield "unpack_sm90", moved, ops.unpack_sm90, packed, {}


def mxfp4_cases(R: int, K: int, E: int = 16):
    """E matrices whose exponents span 12: nothing is lost but by `requantize`; and 30, beyond the window."""
    u8 = {"dtype": torch.uint8, "device": "cuda"}
    moved = R * K * (17 + 18) // 32

    def make(spread):
        codes = torch.randint(256, (E, R // E, K // 2), **u8)
        return codes, torch.randint(110, 110 + spread, (E, R // E, K // 32), **u8)

    for method, spread in (("best", 12), ("requantize", 12), ("best", 30)):
        run = lambda *a, m=method: ops.mxfp4_to_nvfp4(*a, m)  # noqa: E731
        peer = {"compiled": peers.mxfp4_lossless} if (method, spread) == ("best", 12) else {}
        name = f"mxfp4 {method}" + ("" if spread == 12 else " wide")
        yield name, moved, run, lambda n=spread: make(n), peer


def measure_bandwidth(R: int, K: int, wanted: list[str]) -> list[dict]:
    results, cases = [], [case for case in bandwidth_cases(R, K) if not wanted or case[0].strip() in wanted]
    if len(cases) < len(wanted):
        raise ValueError(f"--ops: of {wanted} there are {[case[0].strip() for case in cases]}")
    for name, moved, run, make, others in cases:
        inputs = [make() for _ in range(copies_for(moved))]
        beside = peers_of((), inputs, **others)
        # an H200 copies 601,882,624 bytes at 2.7 TB/s and 128 KiB more at 4.2: the faster of two counts
        copies = {"copy": copy_of(moved), "copy of more": copy_of(moved + (1 << 18))}
        runs = {"us": (lambda a, run=run: run(*a), inputs), **copies}
        times = replay_microseconds(runs | {n: r for n, r in beside.items() if not isinstance(r, str)})
        times["copy"] = min(times["copy"], times.pop("copy of more"))
        why = {n: r for n, r in beside.items() if isinstance(r, str)}
        results.append({"op": name, "shape": f"[{R}, {K}]", "bytes": moved, **times, "missing": why})
        del inputs, beside, runs, copies
        torch.cuda.empty_cache()
    return results


def in_a_row(run: Callable[[tuple], object], inputs: list[tuple], times: int = 20) -> Run:
    """A graph that holds `times` calls one after another, as a model's layers would."""

    def chain(_):
        for i in range(times):
            run(inputs[i % len(inputs)])

    return chain, [()]


def routing_cases():
    """T, experts, top_k, the logits' dtype, a bias, what route takes besides; and the peers."""
    plain = (peers.route, peers.vllm_route, peers.vllm_route_and_align)
    shapes = [(T, m.experts, m.top_k) for m in MODELS for T in (1, 64)] + [(64, 384, 6), (16384, 384, 6)]
    for shape in shapes:
        yield *shape, torch.float32, None, (), plain
    yield 64, 384, 6, torch.bfloat16, None, (), plain
    for T in (1, 64, 16384):  # as DeepSeek-V3
        grouped = (peers.grouped_route, peers.vllm_grouped_route, None)
        yield T, 256, 8, torch.float32, torch.randn(256, device="cuda"), ("sigmoid", 8, 4, True, 2.5), grouped


def measure_routing(times: int = 20) -> list[dict]:
    results = []
    for T, E, k, dtype, bias, how, (compiled, vllm, aligned) in routing_cases():
        inputs = [(torch.randn(T, E, device="cuda").to(dtype), bias) for _ in range(4)]
        route = lambda a, k=k, how=how: ops.route(*a, k, *how)  # noqa: E731
        both = lambda a, E=E, route=route: ops.permute(route(a)[1], E, 0)  # noqa: E731
        rows = {"us": both, "route": route}
        beside = peers_of((k,), inputs, compiled, vllm)
        beside |= {f"{name} both": run for name, run in peers_of((k,), inputs, None, aligned).items()}
        rows |= {n: r[0] for n, r in beside.items() if not isinstance(r, str)}
        in_rows = replay_microseconds({n: in_a_row(run, inputs, times) for n, run in rows.items()})
        one = {"alone": (both, inputs), "tiny": (lambda a: a[0].view(-1)[:1].add_(0), inputs)}
        kind = "bf16 " * (dtype == torch.bfloat16) + "groups" * bool(how)
        results.append(
            {
                "op": "route + permute",
                "shape": f"T={T} E={E} k={k} {kind}",
                **{name: us / times for name, us in in_rows.items()},
                **replay_microseconds(one),
                "missing": {n: r for n, r in beside.items() if isinstance(r, str)},
            }
        )
    return results


def about() -> dict:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    return {"date": time.strftime("%F"), "gpu, driver, clocks": gpu, "torch": torch.__version__}


def microseconds(row: dict, name: str) -> str:
    return f"{row[name]:.1f}" if name in row else "n/a"


def show(bandwidth: list[dict], routing: list[dict]) -> None:
    columns = (
        f"{'us':>8} {'GB/s':>6} {'copy GB/s':>9} {'% of copy':>9} {'torch.compile us':>16} {'vLLM us':>8}"
    )
    print(f"{'op':<16} {'shape':<14} {columns}")
    for r in bandwidth:
        rates = f"{r['bytes'] / r['us'] / 1e3:>6.0f} {r['bytes'] / r['copy'] / 1e3:>9.0f}"
        share = f"{100 * r['copy'] / r['us']:>8.0f}%"
        beside = f"{microseconds(r, 'torch.compile'):>16} {microseconds(r, 'vLLM'):>8}"
        print(f"{r['op']:<16} {r['shape']:<14} {r['us']:>8.1f} {rates} {share} {beside}")
    heads = ("us", "route", "alone", "tiny", "torch.compile", "vLLM", "vLLM both")
    titles = ("us", "route", "graph of one", "of a tiny kernel", "torch.compile, route", "vLLM, route")
    titles = (*titles, "vLLM, with align")
    print(f"\n{'op':<16} {'shape':<24} " + " ".join(f"{t:>{max(7, len(t))}}" for t in titles))
    for r in routing:
        values = " ".join(
            f"{microseconds(r, h):>{max(7, len(t))}}" for h, t in zip(heads, titles, strict=True)
        )
        print(f"{r['op']:<16} {r['shape']:<24} {values}")
    for why in sorted({f"{n}: {text}" for r in bandwidth + routing for n, text in r["missing"].items()}):
        print(f"n/a {why}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", default=[], help="names in the table's first part; else all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    replay_microseconds({"copy": copy_of(1 << 30)})  # the card idles at a fraction of its clock
    print(json.dumps(about()))
    bandwidth = measure_bandwidth(65536, 7168, args.ops) + measure_bandwidth(32768, 4096, args.ops)
    routing = measure_routing()
    show(bandwidth, routing)
    if args.json:
        report = {**about(), "bandwidth": bandwidth, "routing": routing}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()

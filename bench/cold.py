"""GPU clocks for one call on weights that are not in L2, and the machine's own ceilings, measured alike.

A measurement is one CUDA graph. Before every replay, outside the timed region, 512 MiB are read, so L2
holds none of the weights, and the inputs are touched, as the layer before would have left them. Events
surround the replay, so every time includes a graph's launch ("launch us": of a kernel that does nothing).
What is compared is replayed in turns."""

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import language as tl

FLUSH_BYTES, WARM_UPS, REPLAYS = 512 << 20, 4, 21


@dataclass(frozen=True)
class Time:
    """Microseconds of the replays: the median and the quartiles."""

    us: float
    low: float
    high: float

    @property
    def iqr(self) -> float:
        return self.high - self.low


class Clock:
    def __init__(self, replays: int = REPLAYS):
        self.replays = replays
        self.cold = torch.ones(FLUSH_BYTES // 4, device="cuda")
        self.sink = torch.zeros((), device="cuda")
        self.stream = torch.cuda.Stream()

    def flush(self, warm: tuple[Tensor, ...] = ()) -> None:
        torch.sum(self.cold, 0, out=self.sink)
        for x in warm:
            x.view(torch.uint8).amax()

    def capture(self, run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
        """The graph of a call and what it gives in every replay: a tensor is filled with NaN before.

        `run` is called twice before it is captured, so what it compiles and loads is not in the graph."""
        with torch.cuda.stream(self.stream):
            run()
            run()
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                out = run()
            if isinstance(out, Tensor) and out.is_floating_point():
                out.fill_(torch.nan)
        return graph, out

    def in_turns(self, graphs: list[torch.cuda.CUDAGraph], warm: tuple[Tensor, ...] = ()) -> list[Time]:
        """Of each, a replay of all after the other: what warms the card and lowers its clocks meets all."""
        rounds = [
            [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in graphs]
            for _ in range(WARM_UPS + self.replays)
        ]
        with torch.cuda.stream(self.stream):
            for events in rounds:
                for graph, (start, end) in zip(graphs, events, strict=True):
                    self.flush(warm)
                    start.record()
                    graph.replay()
                    end.record()
            self.stream.synchronize()
        times = []
        for replays in zip(*rounds[WARM_UPS:], strict=True):
            us = [start.elapsed_time(end) * 1e3 for start, end in replays]
            low, median, high = statistics.quantiles(us, n=4, method="inclusive")
            times.append(Time(median, low, high))
        return times

    def time(self, run: Callable[[], object]) -> float:
        """Microseconds of one, alone."""
        return self.in_turns([self.capture(run)[0]])[0].us

    def nanoseconds_of_kernels(
        self, run: Callable[[], object], warm: tuple[Tensor, ...] = (), calls: int = 5
    ):
        """[(kernel, median ns)] of one eager call after a flush. Launched eagerly, kernels have gaps between
        them which a graph has not, and those that overlap count twice: shares, not the layer's time."""
        run()
        torch.cuda.synchronize()
        cuda = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=cuda, acc_events=True) as profile:
            for _ in range(calls):
                self.flush(warm)
                run()
            torch.cuda.synchronize()
        ours = without_flush(kernels_in_order(profile))
        each = len(ours) // calls
        names = [name for name, _ in ours[:each]]
        if names * calls != [name for name, _ in ours]:
            raise RuntimeError(f"moe: the calls differ in their kernels: {sorted({n for n, _ in ours})}")
        return [(names[i], statistics.median(ns for _, ns in ours[i::each])) for i in range(each)]


def kernels_in_order(profile) -> list[tuple[str, float]]:
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name, 1e3 * (e.time_range.end - e.time_range.start)) for e in events]


def without_flush(kernels: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Without torch's reductions, and the memset before one that works in several CTAs."""
    reduces = ["at::native::reduce_kernel" in name for name, _ in kernels]
    memset_of_one = [
        "Memset" in name and after for (name, _), after in zip(kernels, [*reduces[1:], False], strict=True)
    ]
    return [k for k, r, m in zip(kernels, reduces, memset_of_one, strict=True) if not (r or m)]


@triton.jit
def _read(x, sink, n, BLOCK: tl.constexpr):
    best = tl.zeros((BLOCK,), tl.int32)
    for at in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        best = tl.maximum(best, tl.load(x + at + tl.arange(0, BLOCK)))
    if tl.max(best, 0) == 1 << 30:  # never; or the loads would go
        tl.store(sink, 1)


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    for at in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        tl.store(y + at + tl.arange(0, BLOCK), tl.load(x + at + tl.arange(0, BLOCK)))


def ceilings(clock: Clock) -> dict[str, float]:
    """copy and read TB/s (a copy of n bytes moves 2 n), cuBLAS BF16 TFLOP/s, a graph's launch in us. Where
    torch and a plain loop do the same, the faster: a graph's memcpy ran at 2.7 TB/s instead of 4.2 here."""

    def fastest(*runs) -> float:
        return min(clock.time(run) for run in runs)

    n, loop = 1 << 29, {"BLOCK": 8192, "num_warps": 16}  # 2 GiB
    x, y = (torch.zeros(n, dtype=torch.int32, device="cuda") for _ in range(2))
    persistent = (8 * torch.cuda.get_device_properties(0).multi_processor_count,)
    copies = [lambda grid=grid: _copy[grid](x, y, n, **loop) for grid in (persistent, (n // 8192,))]
    by_torch = lambda: torch.sum(x.view(torch.float32), 0, out=clock.sink)  # noqa: E731
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return {
        "copy TB/s": 8 * n / fastest(lambda: y.copy_(x), *copies) / 1e6,
        "read TB/s": 4 * n / fastest(by_torch, lambda: _read[persistent](x, clock.sink, n, **loop)) / 1e6,
        "BF16 8192^3 TFLOP/s": 2 * 8192**3 / fastest(lambda: a @ b) / 1e6,
        "launch us": fastest(lambda: torch.cuda._sleep(0)),
    }


def gpu() -> dict[str, str]:
    """Clocks as they are at the moment of asking."""
    fields = "name", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return dict(zip(fields, (part.strip() for part in line.split(",")), strict=True))


def about(commit: str) -> dict[str, object]:
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"date": time.strftime("%F"), "commit": commit, **gpu(), **versions}

"""Clocks. CPU: wall time with weights that rotate beyond the last-level cache."""

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def cpu_microseconds(run: Callable[[int], object], copies: int, seconds: float = 0.5) -> float:
    """Median of run(i), i cycling over `copies` sets of operands (so weights come from memory), after two
    warm-ups."""
    times = []
    cycle = itertools.cycle(range(copies))
    for _ in range(2):
        run(next(cycle))
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        i = next(cycle)
        start = time.perf_counter()
        run(i)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def heading(subject: str) -> str:
    return (
        f"{subject}, {cpu_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, median wall time"
    )

"""What a report draws: distributions gathered while a checkpoint streams by."""

import math

import torch

from .finding import Histogram
from .statistics import E4M3, FINITE, Exponents, Folding, Table

QUARTERS = 4  # bars for a power of two
BARS = 40


class Distributions:
    def __init__(self):
        self.scales = torch.zeros(256, dtype=torch.int64)  # NVFP4 blocks by scale byte
        self.exponents = torch.zeros(256, dtype=torch.int64)  # MXFP4 blocks that are not zero, by byte
        self.largest = torch.zeros(8, dtype=torch.int64)  # NVFP4 blocks by their largest |code|
        self.codes = torch.zeros(16, dtype=torch.int64)
        self.alphas: list[float] = []
        self.losses: list[float] = []
        self.spreads: list[int] = []
        self.ratios: list[float] = []

    def nvfp4(self, table: Table, alphas: list[float], losses: list[Folding]) -> None:
        self.scales += table.scales
        self.largest += table.counts.sum(0)
        self.codes += table.codes
        self.alphas += [alpha for alpha in alphas if math.isfinite(alpha) and alpha > 0]
        self.losses += [loss.rms for loss in losses]

    def mxfp4(self, table: Table, found: Exponents | None) -> None:
        self.exponents += table.live
        self.codes += table.codes
        if found is not None:
            self.spreads.append(found.spread)

    def histograms(self) -> list[Histogram]:
        """Those that have something to show."""
        percent = [100 * loss for loss in self.losses]
        return [h for h in (
            self._block_scales(),
            _bars("Global scales (as multipliers)", "tensors", "log10", [math.log10(a) for a in self.alphas]),
            _ratios(self.ratios),
            _bars("Loss if alpha were folded into E4M3", "tensors", "relative RMS, %", percent),
            self._codes(),
            self._mx_exponents(),
            _whole("MXFP4 exponent spread", "tensors", "powers of two", self.spreads, "NVFP4 holds 17"),
        ) if h is not None]  # fmt: skip

    def _block_scales(self) -> Histogram | None:
        counts = self.scales[1:FINITE]
        if not int(counts.sum()):
            return None
        low, high = -9, 9
        bars = ((E4M3[1:FINITE].log2() - low) * QUARTERS).long()
        totals = torch.zeros((high - low) * QUARTERS, dtype=torch.int64).index_add_(0, bars, counts)
        edges = tuple(low + i / QUARTERS for i in range(len(totals) + 1))
        return Histogram(
            "Block scales (E4M3)",
            "blocks",
            "log2",
            edges,
            tuple(totals.tolist()),
            f"{int(self.scales[0])} scales are 0",
        )

    def _mx_exponents(self) -> Histogram | None:
        there = self.exponents.nonzero().flatten()
        if not len(there):
            return None
        low, high = int(there[0]), int(there[-1])
        edges = tuple(i - 127.5 for i in range(low, high + 2))
        return Histogram(
            "MXFP4 block exponents", "blocks", "log2", edges, tuple(self.exponents[low : high + 1].tolist())
        )

    def _codes(self) -> Histogram | None:
        """|code| as it is used; the sign only matters for zero."""
        if not int(self.codes.sum()):
            return None
        sizes = self.codes[:8] + self.codes[8:]
        minus_zero = f"{int(self.codes[8]) / int(self.codes.sum()):.2%} of the values are -0"
        edges = tuple(c - 0.5 for c in range(9))
        return Histogram(
            "Codes: 0 .5 1 1.5 2 3 4 6", "values", "|code|", edges, tuple(sizes.tolist()), minus_zero
        )


def _bars(title: str, counted: str, unit: str, values: list[float], low=None, high=None, note=""):
    if not values:
        return None
    low, high = min(values) if low is None else low, max(values) if high is None else high
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    at = torch.tensor(values, dtype=torch.float64)
    counts = torch.histc(at.clamp(low, high), BARS, low, high).long().tolist()
    edges = tuple(low + (high - low) * i / BARS for i in range(BARS + 1))
    return Histogram(title, counted, unit, edges, tuple(counts), note)


def _ratios(values: list[float]) -> Histogram | None:
    logs = [math.log2(v) for v in values]
    reach = max((abs(v) for v in logs), default=0.0) or 0.5
    equal = sum(abs(v) < 1e-6 for v in logs)
    note = f"{equal} of {len(logs)} pairs are equal"
    return _bars("Up's global scale over gate's", "pairs", "log2", logs, -reach, reach, note)


def _whole(title: str, counted: str, unit: str, values: list[int], note: str) -> Histogram | None:
    if not values:
        return None
    counts = torch.bincount(torch.tensor(values)).tolist()
    return Histogram(
        title, counted, unit, tuple(i - 0.5 for i in range(len(counts) + 1)), tuple(counts), note
    )

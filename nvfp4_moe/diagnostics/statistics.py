"""Numbers about one quantized matrix, from its codes and block scales alone. Pure functions on tensors."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import E4M3_MAX, e2m1_decode, unpack

CHUNK = 4 << 20  # bytes of codes looked at at once, so that temporaries stay in cache
E4M3 = (
    torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
)  # by byte; 0x7F and 0xFF are NaN
FINITE = 0x7F  # bytes 0 .. 0x7E are finite and not negative
SATURATED = 0x7E  # 448
SIX = 7  # the code of the largest value
POWERS = torch.tensor([0x01, 0x02, 0x04, *range(0x08, 0x7F, 8)])  # 2^-9 .. 2^8


@dataclass(frozen=True)
class Table:
    """counts[b, c]: blocks of scale byte b whose largest |code| is c. codes[c]: values of code c."""

    counts: Tensor  # int64 [256, 8]
    codes: Tensor  # int64 [16]

    @property
    def scales(self) -> Tensor:
        """Blocks by scale byte."""
        return self.counts.sum(1)

    @property
    def live(self) -> Tensor:
        """Blocks with a nonzero code, by scale byte."""
        return self.counts[:, 1:].sum(1)

    @property
    def blocks(self) -> int:
        return int(self.counts.sum())


def row_chunks(packed: Tensor, scales: Tensor) -> Iterable[tuple[int, Tensor, Tensor]]:
    """(first row, packed rows, scale rows) of [N, K/2] and [N, blocks]."""
    step = max(1, CHUNK // max(packed.shape[1], 1))
    for row in range(0, packed.shape[0], step):
        yield row, packed[row : row + step], scales[row : row + step]


def largest_codes(packed: Tensor, blocks: int) -> Tensor:
    """packed uint8 [rows, K/2] -> the largest |code| of each of a row's blocks, uint8 [rows, blocks]."""
    largest = torch.maximum(packed & 7, packed >> 4 & 7).unflatten(-1, (blocks, -1))
    while largest.shape[-1] > 1:  # pairwise: three times as fast as amax over so short a dimension
        half = largest.shape[-1] // 2
        largest = torch.maximum(largest[..., :half], largest[..., half:])
    return largest[..., 0]


def block_table(packed: Tensor, scales: Tensor) -> Table:
    """packed uint8 [N, K/2], scales uint8 [N, K/16 or K/32]."""
    counts, nibbles = torch.zeros(2048, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
    for _, rows, row_scales in row_chunks(packed, scales):
        joint = row_scales.int() * 8 + largest_codes(rows, scales.shape[1])
        counts += torch.bincount(joint.flatten(), minlength=2048)
        nibbles += torch.bincount(rows.flatten(), minlength=256)
    pairs = nibbles.view(16, 16)  # [high nibble, low nibble]
    return Table(counts.view(256, 8), pairs.sum(0) + pairs.sum(1))


def first_block(packed: Tensor, scales: Tensor, wanted) -> list[int] | None:
    """[row, column] of the first block for which wanted(scale bytes, largest codes) holds."""
    for row, rows, row_scales in row_chunks(packed, scales):
        hit = wanted(row_scales, largest_codes(rows, scales.shape[1])).nonzero()
        if len(hit):
            return [row + int(hit[0, 0]), int(hit[0, 1])]
    return None


def powers_of_two(table: Table) -> bool:
    """Every live block's scale is a power of two: a matrix cast from MXFP4."""
    live = table.live
    return int(live[POWERS].sum()) == int(live.sum())


def sampled_std(packed: Tensor, scales: Tensor, blocks: int = 64) -> float:
    """Standard deviation of code times scale over evenly spaced blocks, alpha left out."""
    values = packed.reshape(scales.numel(), -1)
    picked = torch.linspace(0, scales.numel() - 1, min(blocks, scales.numel())).long()
    s = E4M3[scales.flatten()[picked].long()]
    return float((e2m1_decode(unpack(values[picked])) * s[:, None]).std(correction=0))


@dataclass(frozen=True)
class Folding:
    """What folding alpha into the E4M3 block scales would cost."""

    rms: float  # relative, over blocks
    zeroed: float  # share of the blocks whose scale becomes 0
    clamped: float  # share of the blocks whose scale exceeds 448


def folding(table: Table, alpha: float) -> Folding:
    live = table.live[1:FINITE].double()
    exact = E4M3[1:FINITE].double() * alpha
    folded = exact.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).double()
    total = live.sum().clamp(min=1)
    rms = ((folded / exact - 1).square() * live).sum() / total
    return Folding(
        float(rms.sqrt()), float(live[folded == 0].sum() / total), float(live[exact > E4M3_MAX].sum() / total)
    )


@dataclass(frozen=True)
class Exponents:
    """Of the blocks with a nonzero code. An NVFP4 tensor holds a spread of 17 without loss."""

    low: int
    high: int

    @property
    def spread(self) -> int:
        return self.high - self.low

    def union(self, other: "Exponents") -> "Exponents":
        return Exponents(min(self.low, other.low), max(self.high, other.high))


def exponents(table: Table) -> Exponents | None:
    """None where every code is zero. Bytes 253 .. 255, which NVFP4 cannot hold, have no say."""
    found = table.live[:253].nonzero().flatten()
    return Exponents(int(found[0]) - 127, int(found[-1]) - 127) if len(found) else None


def out_of_range(table: Table, high: int) -> tuple[int, float]:
    """Blocks more than 17 powers of two below `high`, and their relative RMS error after conversion, about.

    d below: 0 up to 17, 15.3 % at 18, 32.3 % at 19, 60.6 % at 20, all of it from 22 on (Gaussian blocks)."""
    lost = {18: 0.153, 19: 0.323, 20: 0.606, 21: 0.85}
    d = high - (torch.arange(253) - 127)
    live = table.live[:253] * (d > 17)
    count = int(live.sum())
    squares = sum(int(n) * lost.get(int(depth), 1.0) ** 2 for n, depth in zip(live, d, strict=True) if n)
    return count, (squares / count) ** 0.5 if count else 0.0

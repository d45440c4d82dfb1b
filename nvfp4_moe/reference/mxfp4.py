"""MXFP4 -> NVFP4: the definition.

MXFP4 scales 32 values by 2^k, k = byte - 127. NVFP4 scales 16 values, a half block, by an E4M3
and all of them by alpha. An E4M3 holds 2^-9 .. 2^8 exactly: with alpha = 2^m a block whose k - m
lies there keeps its codes and loses nothing, and a tensor whose k spread over at most 17 loses
nothing at all. The methods differ in m and in what they do beyond that:

    best               exact up to a spread of 17; beyond, the alpha, and for every half block the
                       E4M3 scale, of the smallest squared error: never worse than any other method
    hybrid             m = kmax - 8; half blocks below the window are quantized again under 2^m
    requantize         alpha = amax / 2688; every half block quantized as a dense tensor would be
    verbatim_midpoint  codes kept, scales clamped to the window; m amid the k, or by their median
    verbatim_search    the same, but beyond a spread of 17 the m of the smallest squared error

On the odd cases all methods agree:
- a half block of zero codes keeps them, gets scale 1 and has no say in alpha, whatever its k;
- a block with a nonzero code and k > 125 (6 * 2^126 overflows float32; byte 255 is NaN) keeps its
  codes, gets scale byte 0x7F in both halves and has no say in alpha;
- byte 0 is 2^-127, not zero; -0 stays -0; alpha is 1 if nothing has a say in it.
"""

from itertools import product

import torch
from torch import Tensor

from ..formats import (
    BLOCK,
    E2M1,
    E4M3_NAN,
    MX_BLOCK,
    TENSOR_MAX,
    e2m1_decode,
    e2m1_encode,
    e8m0_decode,
    pack,
    unpack,
)
from .numbers import block_scale, lane_sum

LOW, HIGH = -9, 8  # the window: 2^p is an E4M3 value for p in LOW .. HIGH
MAX_SPREAD = HIGH - LOW
MAX_BYTE = 252  # k = 125
ONE = 0x38  # 1.0 in E4M3

f64 = torch.float64


def mxfp4_to_nvfp4(packed: Tensor, e8m0: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """packed [.., N, K/2], e8m0 [.., N, K/32] -> packed [.., N, K/2], sf [.., N, S], alpha [..].

    e8m0 is uint8 or float8_e8m0fnu. Every leading index is converted on its own; matrices that
    must share an alpha (w1 and w3 of an expert) are concatenated along N first.
    """
    *lead, N, pairs = packed.shape
    out = torch.empty_like(packed)
    sf = packed.new_empty(*lead, N, 2 * pairs // BLOCK)
    alpha = packed.new_empty(lead, dtype=torch.float32)
    for i in product(*map(range, lead)):
        out[i], sf[i], alpha[i] = _Matrix(packed[i], e8m0.view(torch.uint8)[i]).convert(method)
    return out, sf.view(torch.float8_e4m3fn), alpha


class _Matrix:
    """One [N, K] matrix as half blocks [N, S]."""

    def __init__(self, packed: Tensor, e8m0: Tensor):
        def halves(per_block):
            return per_block.repeat_interleave(MX_BLOCK // BLOCK, -1)

        k = e8m0.int() - 127  # [N, K/32]
        self.codes = unpack(packed).unflatten(-1, (-1, BLOCK))  # [N, S, 16]
        self.zero = (self.codes & 7 == 0).all(-1)  # [N, S]
        zero_block = self.zero.unflatten(-1, (-1, MX_BLOCK // BLOCK)).all(-1)  # [N, K/32]
        live_block = ~zero_block & (e8m0 <= MAX_BYTE)
        self.bad = halves(~zero_block & ~live_block)
        self.live = halves(live_block) & ~self.zero
        self.k = halves(k)
        self.block_k = k[live_block]  # [live blocks]
        # [N, S, 16] float32, exact where live
        self.x = e2m1_decode(self.codes) * halves(e8m0_decode(e8m0))[..., None]

    def convert(self, method: str) -> tuple[Tensor, Tensor, Tensor]:
        """-> packed [N, K/2], sf [N, S] as bytes, alpha []."""
        codes, sf, alpha = self.codes.clone(), torch.full_like(self.codes[..., 0], ONE), 1.0
        sf[self.bad] = E4M3_NAN
        if len(self.block_k):
            alpha, m = self.choose_alpha(method)
            kept = self.kept(method, m)
            if kept.any():
                p = (self.k[kept] - m).clamp(LOW, HIGH)
                sf[kept] = _two_to(p).to(torch.float8_e4m3fn).view(torch.uint8)
            again = self.live & ~kept
            if again.any() and method == "best":
                sf[again], codes[again] = quantize_best(self.codes[again], self.k[again], alpha)
            elif again.any():
                sf[again], codes[again] = _quantize(self.x[again], alpha)
        return pack(codes.flatten(-2)), sf, torch.as_tensor(alpha)

    def kept(self, method: str, m: int | None) -> Tensor:
        """Live half blocks that keep their codes, bool [N, S]."""
        if m is None:
            return torch.zeros_like(self.live)
        if method.startswith("verbatim"):
            return self.live
        return self.live & (self.k - m >= LOW) & (self.k - m <= HIGH)

    def choose_alpha(self, method: str) -> tuple[Tensor, int | None]:
        """alpha and, if that is 2^m, m."""
        kmin, kmax = int(self.block_k.min()), int(self.block_k.max())
        fits = kmax - kmin <= MAX_SPREAD
        if method == "requantize":
            return self.amax() / TENSOR_MAX, None
        if method == "hybrid" or (method == "best" and fits):
            # kept normal, 2^-126 or more: where that raises m, every k <= -119 is in its window too
            return _power(max(kmax - HIGH, -126))
        if fits:
            return _power((kmin + kmax + 2) // 2)
        if method == "verbatim_midpoint":
            return _power(int(self.block_k.median()) + 1)  # torch's median is the lower one
        if method == "verbatim_search":
            return _power(self.search(kmin, kmax))
        candidates = self.candidates(kmax)
        errors = [self.squared_error(alpha) for alpha, _ in candidates]
        return candidates[errors.index(min(errors))]

    def search(self, kmin: int, kmax: int) -> int:
        """The first m of the smallest squared error under clamped scales; sums by ascending k.

        A smaller m than kmin + 9 only makes the top blocks worse, a larger one than kmax - 8 only
        the low ones.
        """
        m = torch.arange(kmin - LOW, kmax - HIGH + 1)
        squares = (2 * e2m1_decode(self.codes)).long().square().sum(-1)  # [N, S], whole numbers
        error = torch.zeros(len(m), dtype=f64)
        for k in range(kmin, kmax + 1):
            scale = torch.full_like(m, k).clamp(m + LOW, m + HIGH)
            d = _two_to(torch.tensor(k)) - _two_to(scale)
            error = error + squares[self.live & (self.k == k)].sum().double() * (d * d)
        return int(m[error.argmin()])

    def candidates(self, kmax: int) -> list[tuple[Tensor, int | None]]:
        """The alphas, and their m, that `best` compares; the first of equals wins.

        The lower powers of two can be exact if no top block holds a 4 or 6: a code doubles where
        its scale would leave the window. They hold verbatim_search's m too: a lower one clips the
        top block to 1/16, which 8e8 values of 6 below would have to outweigh. 2^kmax / c gives the
        top blocks scale c instead of 256, so the floor of the window lies lower. Last requantize's.
        """
        powers = [_power(kmax - HIGH - d) for d in range(4)]
        top = _two_to(torch.tensor(kmax)).float()
        parts = [(top / c, None) for c in (288, 320, 352, 384, 416, 448)]
        return [*powers, *parts, (self.amax() / TENSOR_MAX, None)]

    def squared_error(self, alpha: Tensor) -> float:
        """Every half block under its best scale, summed along the rows and then over them."""
        error = torch.zeros(self.live.shape, dtype=f64)
        error[self.live] = _squared_errors(self.codes[self.live], self.k[self.live], alpha).amin(-1)
        return float(lane_sum(lane_sum(error)))

    def amax(self) -> Tensor:
        return self.x[self.live].abs().max()


def _two_to(p: Tensor) -> Tensor:
    """2^p in float64, integers -127 <= p <= 127."""
    return e8m0_decode(p + 127).double()


def _power(m: int) -> tuple[Tensor, int]:
    return _two_to(torch.tensor(m)).float(), m


def _quantize(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, 16] float32 -> sf [n], codes [n, 16]: the rule for dense tensors."""
    sf = block_scale(x.abs().amax(-1), alpha)
    return sf.view(torch.uint8), e2m1_encode(x / (sf.float() * alpha)[:, None])


def quantize_best(codes: Tensor, k: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """codes [n, 16], k [n] -> sf [n], codes [n, 16]: the lowest of the best scales."""
    best = _squared_errors(codes, k, alpha).argmin(-1)
    x = e2m1_decode(codes).double() * _two_to(k)[:, None]
    return (best + 1).to(torch.uint8), e2m1_encode(x / _steps(alpha)[best][:, None])


def _squared_errors(codes: Tensor, k: Tensor, alpha: Tensor) -> Tensor:
    """codes [n, 16], k [n] -> float64 [n, 126]: of each half block under each positive E4M3 scale.

    In float64 code * scale * alpha is exact (30 bits), and a quotient is a tie or at least 2^-31
    away from one, so the codes are the nearest ones. Only d, its square and their sum round.
    """
    steps = _steps(alpha)
    exponents, which = k.unique(return_inverse=True)
    x = torch.tensor(E2M1, dtype=f64) * _two_to(exponents)[:, None]
    d = x[..., None] - e2m1_decode(e2m1_encode(x[..., None] / steps)) * steps
    table = d * d  # [exponents, 8, 126]
    total = torch.zeros(len(k), len(steps), dtype=f64)
    for v in range(1, 8):
        total = total + (codes & 7 == v).sum(-1, keepdim=True) * table[which, v]
    return total


def _steps(alpha: Tensor) -> Tensor:
    """Every positive E4M3 value times alpha, float64 [126]."""
    e4m3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return e4m3.double() * alpha.double()

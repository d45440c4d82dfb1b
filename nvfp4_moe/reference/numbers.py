"""The arithmetic under the reference: IEEE float32 operations with the same bits everywhere.

csrc/kernels/math.h says the same in C++. Plain torch has no float32 fma, so it is built here from float64.
"""

import torch
from torch import Tensor

from ..formats import E2M1_MAX, E4M3_MIN, e4m3_encode

f32 = torch.float32


def fma(a: Tensor, b, c) -> Tensor:
    """float32(a * b + c), rounded once.

    The product of two float32 is exact in float64. The sum is rounded to odd there (if it is inexact, its
    last bit is set), so that the second rounding, to float32, sees on which side the exact value lies."""
    p = a.double() * torch.as_tensor(b, dtype=f32).double()
    c = torch.as_tensor(c, dtype=f32).double().expand_as(p)
    s = p + c
    part = s - p
    error = (p - (s - part)) + (c - part)  # Knuth's two-sum: s + error is the exact sum
    bits = s.view(torch.int64)
    toward_zero = (error < 0) ^ torch.signbit(s)
    odd = torch.where(bits & 1 == 1, bits, bits + torch.where(toward_zero, -1, 1))
    inexact = (error != 0) & s.isfinite() & error.isfinite()
    return torch.where(inexact, odd.view(torch.float64), s).float()


def pow2(p: Tensor) -> Tensor:
    """2^p for whole numbers -126 <= p <= 127, by its bits."""
    return (p.to(torch.int32) + 127 << 23).view(f32)


LOG2E, LOG2E_REST = float.fromhex("0x1.715476p+0"), float.fromhex("0x1.4ae0c0p-26")
EXP2_MOST = 125  # beyond, exp is 0 or infinity: it and 1 / (1 + exp) are never subnormal
EXP2 = [float.fromhex(c) for c in (
    "0x1.5bb9e6p-10", "0x1.3ceab6p-7", "0x1.c6b754p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "1"
)]  # fmt: skip


def reciprocal(d: Tensor) -> Tensor:
    """1 / d; 0 above 2^126, where the true value may be subnormal."""
    return torch.where(d > 2.0**126, 0.0, 1 / d)


def exp2_of_product(x: Tensor, high: Tensor | float, low: float | None = None) -> Tensor:
    """2^(x * high + x * low): 2^n * polynomial(f), |f| <= 1/2. The ends are where x * high passes
    +-EXP2_MOST."""
    high = torch.as_tensor(high, dtype=f32)
    z = x * high
    inside = z.abs() <= EXP2_MOST
    x = torch.where(inside, x, 0.0)
    magic = 12582912.0
    n = fma(x, high, magic) - magic
    f = fma(x, high, -n)
    if low is not None:
        f = fma(x, low, f)
    p = torch.full_like(x, EXP2[0])
    for c in EXP2[1:]:
        p = fma(p, f, c)
    y = torch.where(z > 0, torch.inf, 0.0)
    return torch.where(z.isnan(), z, torch.where(inside, p * pow2(n), y))


def exp(x: Tensor) -> Tensor:
    """exp in float32, within 2.3 ulp; 0 and infinity beyond |x| = 86.6."""
    return exp2_of_product(x, LOG2E, LOG2E_REST)


def sigmoid(x: Tensor) -> Tensor:
    return reciprocal(1 + exp(-x))


def log1p(u: Tensor) -> Tensor:
    """log(1 + u) for 0 <= u <= 1."""
    s = u * reciprocal(2 + u)
    z = s * s
    p = torch.full_like(u, 1 / 15)
    for i in (13, 11, 9, 7, 5, 3, 1):
        p = fma(p, z, 1 / i)
    return 2 * (s * p)


def softplus(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0) + log1p(exp(-x.abs()))


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root. torch's own in float32 on a CPU is not; rounding float64's is."""
    return x.double().sqrt().float()


def swish(g: Tensor, beta: float) -> Tensor:
    """g * sigmoid(beta * g), the exponent one product: within 2^-24 of itself."""
    slope = -(torch.tensor(beta, dtype=f32) * LOG2E)
    return g * reciprocal(1 + exp2_of_product(g, slope))


def lane_sum(x: Tensor) -> Tensor:
    """Sum over the last axis in a fixed order: 32 lanes take every 32nd value each, then a butterfly adds the
    lanes.

    A warp adds so by itself; a CPU can, with vectors.
    """
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    total = torch.zeros_like(x[..., 0, :])
    for i in range(x.shape[-2]):
        total = total + x[..., i, :]
    for half in (16, 8, 4, 2, 1):
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def finite_amax(x: Tensor, dim=None) -> Tensor:
    """max |x| over finite values, 0 if there are none."""
    x = torch.where(x.isfinite(), x.float().abs(), 0.0)
    if x.numel() == 0:
        return x.new_zeros(()) if dim is None else x.new_zeros(x.shape[:-1])
    return x.amax() if dim is None else x.amax(dim)


def row_scale(amax: Tensor) -> Tensor:
    """The smallest power of two >= amax / 2688 (2688 = 1.3125 * 2^11), at least 2^-126; 0 for 0."""
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    p = exponent - 12 + (mantissa > 1.3125 / 2)
    return torch.where(amax == 0, 0.0, pow2(p.clamp(min=-126)))


def block_scale(amax: Tensor, scale: Tensor) -> Tensor:
    """e4m3(clamp(amax / (6 * scale), 2^-9, 448)); 0/0 counts as 0, NaN stays NaN (byte 0x7F)."""
    q = amax / (E2M1_MAX * scale)
    q = torch.where(q.isnan(), torch.where(amax == 0, 0.0, torch.nan), q)
    return e4m3_encode(q.clamp(min=E4M3_MIN))

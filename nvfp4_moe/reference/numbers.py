"""The arithmetic under the reference: IEEE float32 operations with the same bits everywhere.

csrc/kernels/math.h says the same in C++. Plain torch has no float32 fma, so it is built here from float64.
"""

import math

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


def exp(x: Tensor) -> Tensor:
    """exp in float32: 2^n * polynomial(r); within 1 ulp."""
    magic = 12582912.0
    n = x.clamp(-104, 89) * float.fromhex("0x1.715476p+0") + magic - magic
    n = n.nan_to_num()
    r = fma(n, -float.fromhex("0x1.62e400p-1"), x)
    r = fma(n, -float.fromhex("0x1.7f7d1cp-20"), r)
    p = torch.full_like(x, 1 / math.factorial(7))
    for i in (6, 5, 4, 3, 2, 1, 0):
        p = fma(p, r, 1 / math.factorial(i))
    half = torch.floor(n / 2)
    y = p * pow2(half) * pow2(n - half)
    y = torch.where(x > float.fromhex("0x1.62e42ep+6"), torch.inf, y)
    y = torch.where(x < -104, 0.0, y)
    return torch.where(x.isnan(), x, y)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + exp(-x))


def log1p(u: Tensor) -> Tensor:
    """log(1 + u) for 0 <= u <= 1."""
    s = u / (2 + u)
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
    """g * sigmoid(beta * g)."""
    return g / (1 + exp(-(torch.tensor(beta, dtype=f32) * g)))


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

"""grouped_gemm and linear: exact products, one rounding order. Sums here are float64, so these are the centre
of the float32 backends' error bound rather than their bits."""

import torch
from torch import Tensor

from .quantize import products, quantize_rows, unmap_sf


def _epilogue(acc: Tensor, alpha: Tensor, a_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """bf16((acc * alpha) * a_scale + bias); alpha [] or [N], a_scale [] or [R]."""
    out = acc.float() * alpha
    if a_scale is not None:
        out = out * a_scale.expand(out.shape[0])[:, None]
    if bias is not None:
        out = out + bias
    return out.bfloat16()


def spread_alpha(alpha: Tensor, N: int) -> Tensor:
    """[E] or [E, 2] (gate half, up half) -> [E, N]."""
    alpha = alpha if alpha.dim() == 2 else alpha[:, None]
    return alpha.repeat_interleave(N // alpha.shape[1], 1)


def grouped_gemm(
    a: Tensor,
    a_sf: Tensor | None,
    a_scale: Tensor | None,
    b: Tensor,
    b_sf: Tensor,
    alpha: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """a packed [R, K/2] + a_sf [R, S] + a_scale [] or [R], or bf16 [R, K]; b [E, N, K/2], b_sf [E, cosize(N,
    S)], alpha [E] or [E, 2], offsets int32 [E+1], bias [E, N] -> bf16 [R, N]; rows of no expert are zero."""
    E, N, half = b.shape
    K = 2 * half
    x = a.double() if a_sf is None else products(a, a_sf).double()
    out = torch.zeros(a.shape[0], N, dtype=torch.bfloat16)
    alpha = spread_alpha(alpha, N)
    for e in range(E):
        begin = min(max(int(offsets[e]), 0), len(x))
        end = min(max(int(offsets[e + 1]), begin), len(x))
        w = products(b[e], unmap_sf(b_sf[e], N, K // 16)).double()
        row_scales = a_scale if a_scale is None or a_scale.dim() == 0 else a_scale[begin:end]
        acc = x[begin:end] @ w.T
        out[begin:end] = _epilogue(acc, alpha[e], row_scales, None if bias is None else bias[e])
    return out


def linear(
    x: Tensor, b: Tensor, b_sf: Tensor, alpha: Tensor, compute: str, bias: Tensor | None = None
) -> Tensor:
    """x bf16 [.., K], b [N, K/2], b_sf [cosize(N, S)], alpha [] or [N] -> bf16 [.., N]."""
    N, K = b.shape[0], 2 * b.shape[1]
    rows = x.flatten(0, -2)
    w = products(b, unmap_sf(b_sf, N, K // 16)).double()
    if compute == "nvfp4":
        packed, sf, scale = quantize_rows(rows)
        out = _epilogue(products(packed, sf).double() @ w.T, alpha, scale, bias)
    else:
        out = _epilogue(rows.double() @ w.T, alpha, None, bias)
    return out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out

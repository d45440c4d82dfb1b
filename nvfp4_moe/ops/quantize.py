"""tensor_scale, quantize, quantize_rows, dequantize, mxfp4_to_nvfp4."""

import torch
from torch import Tensor

from ..checks import ANY, FLOATS, check, expect, expect_multiple, expect_one_of, expect_scale, show_shape
from ..formats import BLOCK, MX_BLOCK
from .base import F8, F32, I32, MXFP4_METHODS, U8, fake, nvfp4, quantized


def tensor_scale(x: Tensor) -> Tensor:
    """x -> float32 []: max |x| over finite values / 2688, on x's device."""
    return nvfp4.tensor_scale(x)


@fake
def _fake_tensor_scale(x):
    expect("tensor_scale", "x", x, x, FLOATS, "[..]", (), tail=True)
    return x.new_empty((), dtype=F32)


def quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., K], scale float32 [] or broadcastable to x.shape[:-1] -> packed [.., K/2], sf [.., S]."""
    return nvfp4.quantize(x, scale)


def _expect_values(op, x):
    expect(op, "x", x, x, FLOATS, "[.., K]", (ANY,), tail=True)
    expect_multiple(op, "K, the last dimension of `x`,", x.shape[-1], BLOCK)


@fake
def _fake_quantize(x, scale):
    _expect_values("quantize", x)
    expect_scale("quantize", "scale", scale, x, x.shape[:-1])
    return quantized(x, x.shape[:-1], x.shape[-1])


def quantize_rows(x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x [.., K] -> packed, sf, scale [..]: one power-of-two scale a row; `rows` int32 [R] gathers x[rows]
    first."""
    return nvfp4.quantize_rows(x, rows)


@fake
def _fake_quantize_rows(x, rows=None):
    op = "quantize_rows"
    _expect_values(op, x)
    lead = x.shape[:-1]
    if rows is not None:
        expect(op, "x", x, x, FLOATS, "[T, K] where `rows` is given", (ANY, x.shape[-1]))
        expect(op, "rows", rows, x, (I32,), "[R]", (ANY,))
        n = rows.shape[0]
        check(
            lead[0] > 0 or n == 0,
            op,
            f"`x` must have a row to gather, got {show_shape(x.shape)} with {n} `rows`",
        )
        lead = rows.shape
    return *quantized(x, lead, x.shape[-1]), x.new_empty(lead, dtype=F32)


def dequantize(packed: Tensor, sf: Tensor, scale: Tensor, dtype: torch.dtype = F32) -> Tensor:
    """packed [.., K/2], sf [.., S], scale [] or broadcastable to the leading shape -> [.., K]."""
    return nvfp4.dequantize(packed, sf, scale, dtype)


@fake
def _fake_dequantize(packed, sf, scale, dtype):
    op = "dequantize"
    expect(op, "packed", packed, packed, (U8,), "[.., K/2]", (ANY,), tail=True)
    lead, K = packed.shape[:-1], 2 * packed.shape[-1]
    expect_multiple(op, "K, twice the last dimension of `packed`,", K, BLOCK)
    expect(op, "sf", sf, packed, (F8,), "[.., K/16]", (*lead, K // BLOCK))
    got = str(dtype).removeprefix("torch.")
    check(dtype in FLOATS, op, f"`dtype` must be float32 | float16 | bfloat16, got {got}")
    expect_scale(op, "scale", scale, packed, lead)
    return packed.new_empty((*lead, K), dtype=dtype)


def mxfp4_to_nvfp4(packed: Tensor, e8m0: Tensor, method: str = "best") -> tuple[Tensor, Tensor, Tensor]:
    """packed [.., N, K/2], e8m0 [.., N, K/32] uint8 or float8_e8m0fnu -> packed, sf [.., N, S], alpha
    [..]."""
    return nvfp4.mxfp4_to_nvfp4(packed, e8m0, method)


@fake
def _fake_mxfp4_to_nvfp4(packed, e8m0, method):
    op = "mxfp4_to_nvfp4"
    expect(op, "packed", packed, packed, (U8,), "[.., N, K/2]", (ANY, ANY), tail=True)
    (*lead, N, half) = packed.shape
    expect_multiple(op, "K, twice the last dimension of `packed`,", 2 * half, MX_BLOCK)
    wanted = (*lead, N, 2 * half // MX_BLOCK)
    expect(op, "e8m0", e8m0, packed, (U8, torch.float8_e8m0fnu), "[.., N, K/32]", wanted)
    expect_one_of(op, "method", method, MXFP4_METHODS)
    return *quantized(packed, (*lead, N), 2 * half), packed.new_empty(lead, dtype=F32)

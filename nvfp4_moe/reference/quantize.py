"""quantize, quantize_rows, dequantize and the scale-factor remaps: the definitions."""

from itertools import pairwise

import torch
from torch import Tensor

from ..formats import (
    BLOCK,
    TENSOR_MAX,
    e2m1_decode,
    e2m1_encode,
    pack,
    sf_coord,
    sf_cosize,
    sf_offset,
    unpack,
)
from .numbers import block_scale, finite_amax, row_scale


def tensor_scale(x: Tensor) -> Tensor:
    """x -> float32 []: max |x| over finite values / 2688."""
    return finite_amax(x) / TENSOR_MAX


def quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., K], scale float32 [] or broadcastable to x.shape[:-1] -> packed [.., K/2], sf [.., K/16]."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))  # [.., S, 16]
    scale = scale.expand(x.shape[:-1])[..., None]  # [.., 1]
    sf = block_scale(blocks.abs().amax(-1), scale)  # [.., S]
    step = sf.float() * scale
    # a NaN quotient (0/0, or a NaN block) gives magnitude 0; the sign bit is that of x, and a NaN x has none
    signs = torch.where(blocks.isnan(), 0.0, blocks)
    codes = e2m1_encode(torch.copysign((blocks / step[..., None]).nan_to_num(0.0), signs))
    return pack(codes.flatten(-2)), sf


def quantize_rows(x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """quantize with one power-of-two scale a row; `rows` gathers x[rows] first -> packed, sf, scale."""
    if rows is not None:
        x = x[rows.long().clamp(0, max(x.shape[0] - 1, 0))]
    scale = row_scale(finite_amax(x, -1))
    return *quantize(x, scale), scale


def dequantize(packed: Tensor, sf: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """packed [.., K/2], sf [.., K/16], scale [] or broadcastable to the leading shape -> [.., K]."""
    values = products(packed, sf)
    return (values * scale.expand(values.shape[:-1])[..., None]).to(dtype)


def products(packed: Tensor, sf: Tensor) -> Tensor:
    """e2m1(code) * e4m3(sf) in float32 [.., K], exact."""
    return e2m1_decode(unpack(packed)) * sf.float().repeat_interleave(BLOCK, -1)


def remap_sf(sf: Tensor) -> Tensor:
    """Linear [.., M, S] -> interleaved [.., cosize]. Walks the destination, so padding is 0 and never
    garbage."""
    M, S = sf.shape[-2:]
    row, col = sf_coord(torch.arange(sf_cosize(M, S)), S) if S else (torch.arange(0), torch.arange(0))
    inside = (row < M) & (col < S)
    linear = sf.view(torch.uint8).flatten(-2)
    source = torch.where(inside, row * S + col, 0)
    out = torch.where(inside, linear[..., source], 0) if linear.shape[-1] else linear
    return out.to(torch.uint8).view(torch.float8_e4m3fn)


def unmap_sf(sf: Tensor, rows: int, cols: int) -> Tensor:
    """Interleaved [.., cosize] -> linear [.., rows, cols]."""
    offset = sf_offset(torch.arange(rows)[:, None], torch.arange(cols)[None, :], cols)
    return sf.view(torch.uint8)[..., offset].view(torch.float8_e4m3fn)


def group_sf(sf: Tensor, offsets: Tensor) -> Tensor:
    """Linear row scales [R, S] of a grouped product -> one interleaved buffer, expert after expert, each from
    an atom of its own on; room for the worst offsets, [(R // 128 + min(E, R)) atom rows * 512 ceil(S / 4)],
    the rest zero."""
    R, S = sf.shape
    E = len(offsets) - 1
    parts = [remap_sf(sf[begin:end]).view(torch.uint8) for begin, end in pairwise(offsets.tolist())]
    used = torch.cat([torch.zeros(0, dtype=torch.uint8), *parts])
    out = torch.zeros((R // 128 + min(E, R)) * sf_cosize(1, S), dtype=torch.uint8)
    out[: len(used)] = used
    return out.view(torch.float8_e4m3fn)

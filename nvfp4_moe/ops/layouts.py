"""remap_sf, unmap_sf; pack_sm90, unpack_sm90."""

from torch import Tensor

from ..checks import ANY, check, expect, expect_contiguous, expect_multiple
from ..formats import BLOCK, PACKED_ROWS, packed_row_bytes, sf_cosize
from .base import F8, U8, fake, nvfp4


def remap_sf(sf: Tensor) -> Tensor:
    """Linear scale factors [.., M, S] -> interleaved [.., cosize]; padding is zero."""
    return nvfp4.remap_sf(sf)


@fake
def _fake_remap_sf(sf):
    expect("remap_sf", "sf", sf, sf, (F8,), "[.., M, S]", (ANY, ANY), tail=True)
    return sf.new_empty((*sf.shape[:-2], sf_cosize(sf.shape[-2], sf.shape[-1])))


def unmap_sf(sf: Tensor, rows: int, cols: int) -> Tensor:
    """Interleaved scale factors [.., cosize(rows, cols)] -> linear [.., rows, cols]."""
    return nvfp4.unmap_sf(sf, rows, cols)


@fake
def _fake_unmap_sf(sf, rows, cols):
    op = "unmap_sf"
    check(rows >= 0 and cols >= 0, op, f"`rows` and `cols` must not be negative, got {rows} and {cols}")
    expect(op, "sf", sf, sf, (F8,), "[.., cosize(rows, cols)]", (sf_cosize(rows, cols),), tail=True)
    return sf.new_empty((*sf.shape[:-1], rows, cols))


def pack_sm90(b: Tensor, b_sf: Tensor) -> Tensor:
    """b [.., N, K/2], b_sf interleaved [.., cosize(N, S)] -> uint8 [.., bytes], the order in which Hopper's
    kernels decode them; K % 32 = 0, N % 64 = 0."""
    return nvfp4.pack_sm90(b, b_sf)


@fake
def _fake_pack_sm90(b, b_sf):
    op = "pack_sm90"
    expect(op, "b", b, b, (U8,), "[.., N, K/2]", (ANY, ANY), tail=True)
    expect_contiguous(op, "b", b)
    (*lead, N, half) = b.shape
    expect_multiple(op, "N, the rows of `b`,", N, PACKED_ROWS)
    expect_multiple(op, "K, twice the last dimension of `b`,", 2 * half, 2 * BLOCK)
    cosize = sf_cosize(N, 2 * half // BLOCK)
    expect(op, "b_sf", b_sf, b, (F8,), "[.., cosize(N, K/16)]", (*lead, cosize))
    expect_contiguous(op, "b_sf", b_sf)
    return b.new_empty((*lead, N // PACKED_ROWS * packed_row_bytes(2 * half)))


def unpack_sm90(packed: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The inverse: packed [.., bytes] -> b [.., N, K/2], b_sf interleaved [.., cosize(N, S)], its padding
    zero."""
    return nvfp4.unpack_sm90(packed, K)


@fake
def _fake_unpack_sm90(packed, K):
    op = "unpack_sm90"
    expect(op, "packed", packed, packed, (U8,), "[.., bytes]", (ANY,), tail=True)
    expect_contiguous(op, "packed", packed)
    N, lead = packed_rows(op, "packed", packed, K), packed.shape[:-1]
    return packed.new_empty((*lead, N, K // 2)), packed.new_empty((*lead, sf_cosize(N, K // BLOCK)), dtype=F8)


def is_packed(b: Tensor, b_sf: Tensor, dims: int) -> bool:
    """Whether weights are in sm90's own order: one dimension less than [.., N, K/2], and no scales."""
    return b.dim() == dims and b_sf.numel() == 0


def packed_rows(op: str, w: str, b: Tensor, K: int) -> int:
    """N of such weights, whose bytes and K say it."""
    expect_multiple(op, f"K of `{w}`, packed for sm90,", K, 2 * BLOCK)
    rows = packed_row_bytes(K)
    expect_multiple(op, f"the last dimension of `{w}`, packed for sm90 with K = {K},", b.shape[-1], rows)
    return b.shape[-1] // rows * PACKED_ROWS


def expect_packed(op, w, home, b, b_sf, lead, N, K) -> None:
    expect_multiple(op, f"N of `{w}`, packed for sm90,", N, PACKED_ROWS)
    wanted = (*lead, N // PACKED_ROWS * packed_row_bytes(K))
    expect(op, w, b, home, (U8,), "packed for sm90, [.., bytes]", wanted)
    expect_contiguous(op, w, b)
    expect(op, f"{w}_sf", b_sf, home, (F8,), f"empty, as `{w}` is packed,", b_sf.shape)

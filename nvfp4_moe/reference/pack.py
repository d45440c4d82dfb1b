"""pack_sm90 and unpack_sm90: weights in the order in which Hopper's threads decode them
(csrc/kernels/sm90/packed.h). Said here as a permutation of blocks of 16 values and one of a block's 64
bits."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import BLOCK, PACKED_BLOCK, PACKED_COLUMNS, PACKED_ROWS, packed_row_bytes
from .quantize import remap_sf, unmap_sf

# Rows of a block: [warp][unit][g % 4][g / 4]; its columns of 16 values: [step][c]; in memory
# [unit][warp][g][c][step].
ROWS, COLUMNS = (4, 2, 4, 2), (2, 4)
PLACES = PACKED_ROWS * PACKED_COLUMNS // BLOCK  # each with 8 bytes of codes and one of scales
TO_MEMORY = (1, 0, 3, 2, 5, 4)  # dimensions of ROWS + COLUMNS


def _bit_sources() -> Tensor:
    """For each of a packed block's 64 bits, which bit of the 16 codes (in their own order) it is.

    Pair i of word h is codes 8 h + i and 8 h + i + 4 as BF16 numbers, the first in the lower half: sign in
    bit 15, exponent and mantissa in bits 8 .. 6. The bits of pairs 0, 1 and 2 lie 0, 4 and 10 lower in their
    own word, cyclically. Those of pair 3 take the places that this leaves free in both words: seen with the
    second word turned left by 2, they lie 6 (first word) and 12 (second word) lower."""
    source = torch.full((64,), -1)
    first_rest = 0x06030603
    for h in range(2):
        for i in range(4):
            for half in range(2):
                code = 8 * h + i + 4 * half
                for bit, of_code in ((15, 3), (8, 2), (7, 1), (6, 0)):
                    place = bit + 16 * half
                    if i < 3:
                        at = 32 * h + (place - (0, 4, 10)[i]) % 32
                    else:
                        rest = (place - (6, 12)[h]) % 32
                        at = rest if first_rest >> rest & 1 else 32 + (rest - 2) % 32
                    assert source[at] == -1
                    source[at] = 4 * code + of_code
    return source


BIT_SOURCES = _bit_sources()


def _permute_bits(blocks: Tensor, source: Tensor) -> Tensor:
    """uint8 [.., 8]: bit i of the result is bit source[i] of the 64."""
    bits = (blocks[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)[..., source]
    return (bits.unflatten(-1, (8, 8)) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def _to_memory(x: Tensor) -> Tensor:
    """[n, N, S, bytes] -> [n, blocks, bytes of all places of a block]."""
    n, N, S, width = x.shape
    x = x.reshape(n, N // PACKED_ROWS, *ROWS, S // 8, *COLUMNS, width).movedim(6, 2)
    x = x.permute(0, 1, 2, *(d + 3 for d in TO_MEMORY), 9)
    return x.reshape(n, N // PACKED_ROWS * (S // 8), PLACES * width)


def _from_memory(x: Tensor, N: int, S: int) -> Tensor:
    order, width = [(ROWS + COLUMNS)[d] for d in TO_MEMORY], x.shape[-1] // PLACES
    x = x.reshape(len(x), N // PACKED_ROWS, S // 8, *order, width)
    back = [TO_MEMORY.index(d) + 3 for d in range(6)]
    return x.permute(0, 1, 2, *back, 9).movedim(2, 6).reshape(len(x), N, S, width)


def pack_sm90(b: Tensor, b_sf: Tensor) -> Tensor:
    """b [.., N, K/2], b_sf interleaved [.., cosize(N, S)] -> [.., bytes]; what lies past K is zero."""
    (*lead, N, half), S = b.shape, b.shape[-1] // 8
    n = b.shape[:-2].numel()
    sf = unmap_sf(b_sf, N, S).view(torch.uint8).reshape(n, N, S, 1)
    codes = _permute_bits(b.reshape(n, N, S, 8), BIT_SOURCES)
    missing = -S % (PACKED_COLUMNS // BLOCK)
    parts = [_to_memory(pad(x, (0, 0, 0, missing))) for x in (codes, sf)]
    return torch.cat(parts, -1).reshape(*lead, N // PACKED_ROWS * packed_row_bytes(2 * half))


def unpack_sm90(packed: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """[.., bytes] -> b [.., N, K/2], b_sf interleaved [.., cosize(N, S)] with zeros in its padding."""
    lead, S = packed.shape[:-1], K // BLOCK
    N = packed.shape[-1] // packed_row_bytes(K) * PACKED_ROWS
    width = packed_row_bytes(K) // PACKED_BLOCK * PACKED_COLUMNS // BLOCK
    blocks = packed.reshape(lead.numel(), N // PACKED_ROWS * width // 8, PACKED_BLOCK)
    codes = _from_memory(blocks[..., : 8 * PLACES], N, width)[:, :, :S]
    sf = _from_memory(blocks[..., 8 * PLACES :], N, width)[:, :, :S, 0].reshape(*lead, N, S)
    b = _permute_bits(codes, BIT_SOURCES.argsort()).reshape(*lead, N, K // 2)
    return b, remap_sf(sf.view(torch.float8_e4m3fn))

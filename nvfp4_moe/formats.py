"""NVFP4's constants and layouts; imports nothing of ours.

value = e2m1(code) * e4m3(sf) * alpha, one sf for 16 values along K, alpha float32 and always a multiplier.
"""

import torch
from torch import Tensor

BLOCK = 16  # values that share one e4m3 scale
MX_BLOCK = 32  # values that share one e8m0 scale (MXFP4)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign
E2M1_MAX, E4M3_MAX = 6.0, 448.0
E4M3_MIN = 2.0**-9  # smallest positive subnormal, byte 0x01
E4M3_NAN = 0x7F
TENSOR_MAX = E2M1_MAX * E4M3_MAX  # 2688

ATOM_ROWS, ATOM_COLS = 128, 4  # one atom of the interleaved layout is 512 bytes
ATOM = ATOM_ROWS * ATOM_COLS

# pack_sm90's blocks of 64 rows x 128 codes: 4096 bytes of codes, then 512 of scales
PACKED_ROWS, PACKED_COLUMNS = 64, 128
PACKED_BLOCK = PACKED_ROWS * (PACKED_COLUMNS // 2 + PACKED_COLUMNS // BLOCK)


def sf_cosize(rows: int, cols: int) -> int:
    """Bytes of the interleaved layout of [rows, cols] scales, tile padding included."""
    return (rows + ATOM_ROWS - 1) // ATOM_ROWS * ((cols + ATOM_COLS - 1) // ATOM_COLS) * ATOM


def sf_offset(row, col, cols: int):
    """Byte of scale (row, col) in the interleaved layout; ints or integer tensors."""
    atom = row // ATOM_ROWS * ((cols + ATOM_COLS - 1) // ATOM_COLS) + col // ATOM_COLS
    return atom * ATOM + row % 32 * 16 + row // 32 % 4 * 4 + col % 4


def sf_coord(byte, cols: int):
    """The inverse of sf_offset: (row, col), which may lie in the padding."""
    atom, inside = byte // ATOM, byte % ATOM
    atom_cols = (cols + ATOM_COLS - 1) // ATOM_COLS
    row = atom // atom_cols * ATOM_ROWS + inside % 16 // 4 * 32 + inside // 16
    return row, atom % atom_cols * ATOM_COLS + inside % 4


def packed_row_bytes(K: int) -> int:
    """Bytes of PACKED_ROWS rows in sm90's own order; K is rounded up to whole blocks."""
    return (K + PACKED_COLUMNS - 1) // PACKED_COLUMNS * PACKED_BLOCK


def e2m1_decode(codes: Tensor) -> Tensor:
    """Codes 0..15 (any integer dtype) -> float32; code 8 is -0."""
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float32, device=codes.device)
    return values[codes.long()]


def e2m1_encode(x: Tensor) -> Tensor:
    """float32 -> codes: nearest, ties to the even code, saturating at 6; the sign bit is kept; NaN gives
    0."""
    a = x.abs()
    code = (a > 0.25).to(torch.uint8)
    for bound, tie_goes_up in ((0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code = code + (a >= bound if tie_goes_up else a > bound).to(torch.uint8)
    return code + (torch.signbit(x) & ~x.isnan()).to(torch.uint8) * 8


def e4m3_encode(x: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn: nearest even, saturating at 448, NaN kept. (torch itself saturates since 2.12
    only.)"""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e8m0_decode(byte: Tensor) -> Tensor:
    """uint8 -> float32: 2^(byte - 127); 255 is NaN; byte 0 is 2^-127, not zero."""
    value = (byte.long() - 127 + 1023 << 52).view(torch.float64).float()
    return torch.where(byte == 255, torch.nan, value)


def e8m0_encode(x: Tensor) -> Tensor:
    """float32 -> uint8: the nearest power of two (1.5 * 2^p goes up), sign dropped, NaN and Inf 255."""
    return x.to(torch.float8_e8m0fnu).view(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """Codes [.., K] -> bytes [.., K/2], low nibble = even k."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Bytes [.., K/2] -> codes [.., K]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)

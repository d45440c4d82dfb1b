"""How much of a weight an NVFP4 one kept: measured on the two, not taken from the method's promise."""

import torch
from torch import Tensor

from ..formats import BLOCK, E4M3_MAX, E4M3_MIN, MX_BLOCK, e2m1_decode, e8m0_decode, unpack
from ..tensor import Mxfp4Tensor, Nvfp4Tensor

ROWS_AT_ONCE = 256


def compare_scales(halves: int, scales: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """A report line of what was renamed: codes and block scales are the same bytes, and a multiplier x that
    is stored as 1 / x may be rounded. scales: {role: (before, after)}, multipliers as the two files say them
    in float64, where the inverse of a float32 is exact enough to tell (two that differ do by 2^-47)."""
    errors = {
        role: abs(float(after / before) - 1) for role, (before, after) in scales.items() if before != after
    }
    rounded = {role: error for role, error in errors.items() if error > 2.0**-50}
    return {"exact": "alpha" not in rounded, "halves": halves} | ({"rounded": rounded} if rounded else {})


def compare(before: Mxfp4Tensor, after: Nvfp4Tensor) -> dict:
    """Matrices [N, K] -> a report line: exact, and where it is not, how far off.

    changed: half blocks with a value that is not the source's; relative_rms: of all values; spread: kmax -
    kmin over blocks that are not zero. A NaN exponent on a block of zeros is harmless, and counted."""
    halves = after.sf.numel()
    line = {"exact": True, "halves": halves, "alpha": float(after.alpha)}
    if stray := int((before.e8m0 == 0xFF).sum()):
        line["nan_scales_on_zeros"] = stray
    if _same_codes_and_scales(before, after):
        return line
    changed, error, power = 0, 0.0, 0.0
    for rows in torch.arange(len(before.packed)).split(ROWS_AT_ONCE):
        want, got = _mx_values(before, rows), _nv_values(after, rows)  # [n, S, 16] float64, exact
        changed += int((want != got).any(-1).sum())
        error += float((want - got).square().sum())
        power += float(want.square().sum())
    if not changed:
        return line
    live = (before.packed.unflatten(-1, (-1, MX_BLOCK // 2)) & 0x77 != 0).any(-1)
    k = before.e8m0[live]
    return line | {
        "exact": False,
        "changed": changed,
        "relative_rms": (error / power) ** 0.5,
        "spread": int(k.max()) - int(k.min()),
    }


def _same_codes_and_scales(before: Mxfp4Tensor, after: Nvfp4Tensor) -> bool:
    """Without decoding a value: true for every tensor that was converted by copying its codes."""
    if not _same_bytes(before.packed, after.packed):
        return False
    want = _exact_scales(after.alpha)[before.e8m0.int()].repeat_interleave(MX_BLOCK // BLOCK, -1)
    differ = after.sf.view(torch.uint8) != want
    if not differ.any():
        return True
    codes = after.packed.unflatten(-1, (-1, BLOCK // 2))[differ]
    return not (codes & 0x77).any()  # a half block of zeros may have any scale


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """[N, K/2], K a multiple of 32. Eight bytes at a time, torch compares five times as fast."""
    if a.data_ptr() % 8 == b.data_ptr() % 8 == 0:
        a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)


def _exact_scales(alpha: Tensor) -> Tensor:
    """By E8M0 byte, the E4M3 byte that is 2^k / alpha; 0, which no scale has, where none is."""
    ratio = e8m0_decode(torch.arange(256)).double() / alpha.double()
    ratio = torch.where((ratio >= E4M3_MIN) & (ratio <= E4M3_MAX), ratio, 0.0)
    sf = ratio.float().to(torch.float8_e4m3fn)
    return torch.where(sf.double() == ratio, sf.view(torch.uint8), 0)


def _mx_values(w: Mxfp4Tensor, rows: Tensor) -> Tensor:
    # a zero times the NaN of a stray exponent is still a zero
    scale = e8m0_decode(w.e8m0[rows]).double().nan_to_num(0.0)
    return _halves(w.packed[rows]) * scale.repeat_interleave(MX_BLOCK // BLOCK, -1)[..., None]


def _nv_values(w: Nvfp4Tensor, rows: Tensor) -> Tensor:
    sf = w.sf.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    return _halves(w.packed[rows]) * (sf.double() * w.alpha.double())[..., None]


def _halves(packed: Tensor) -> Tensor:
    return e2m1_decode(unpack(packed)).double().unflatten(-1, (-1, BLOCK))

"""Nvfp4Tensor and Mxfp4Tensor, the dataclasses weights travel in: checkpoints and quantizers make them,
layers take the first."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import ops
from .formats import (
    BLOCK,
    E2M1_MAX,
    E4M3_MAX,
    E4M3_NAN,
    MX_BLOCK,
    TENSOR_MAX,
    e2m1_decode,
    e2m1_encode,
    e4m3_encode,
    e8m0_decode,
    pack,
    unpack,
)

METHODS = ("amax", "four_over_six", "mse")


@dataclass(frozen=True)
class Nvfp4Tensor:
    """w[.., n, k] = e2m1(packed) * e4m3(sf) * alpha[..]"""

    packed: Tensor  # [.., N, K/2] uint8, low nibble is the even k
    sf: Tensor  # [.., N, S] float8_e4m3fn, linear
    alpha: Tensor  # [..] float32, a multiplier; [.., 2]: of the first and of the second half of N (gate, up)

    @property
    def shape(self) -> torch.Size:
        """The logical shape [.., N, K]."""
        return torch.Size((*self.packed.shape[:-1], 2 * self.packed.shape[-1]))

    def to(self, device) -> "Nvfp4Tensor":
        return replace(
            self, packed=self.packed.to(device), sf=self.sf.to(device), alpha=self.alpha.to(device)
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        alpha = self.alpha[..., None]  # one for each row
        if self.alpha.dim() == self.packed.dim() - 1:
            alpha = self.alpha.repeat_interleave(self.packed.shape[-2] // 2, -1)
        return ops.dequantize(self.packed, self.sf, alpha, dtype)

    def padded(self, N: int, K: int) -> "Nvfp4Tensor":
        """Grown to [.., N, K] with zero codes (and zero scales, so the padding is 0 whatever alpha is)."""
        more_n, more_k = N - self.shape[-2], K - self.shape[-1]
        packed = pad(self.packed, (0, more_k // 2, 0, more_n))
        sf = pad(self.sf.view(torch.uint8), (0, more_k // BLOCK, 0, more_n)).view(torch.float8_e4m3fn)
        return replace(self, packed=packed, sf=sf)

    def interleaved_sf(self) -> Tensor:
        """[.., cosize(N, S)]: the layout layers hold and GEMMs read."""
        return ops.remap_sf(self.sf)

    @staticmethod
    def quantize(w: Tensor, method: str = "amax") -> "Nvfp4Tensor":
        """w [.., N, K] of any float type -> one alpha for each leading index.

        amax: ModelOpt's bytes · four_over_six: each block's maximum goes to 6 or to 4, whichever errs less ·
        mse: the best of all 126 block scales. 9.51, 8.70 and 8.13 % relative RMS error on Gaussian data.
        """
        if method not in METHODS:
            raise ValueError(f"Nvfp4Tensor.quantize: `method` must be {' | '.join(METHODS)}, got {method}")
        K = w.shape[-1]
        w = pad(w, (0, -K % BLOCK))
        # four_over_six keeps room for 1.5 times the largest scale, so that the largest block may use 4 as
        # well
        reach = 6 * 256 if method == "four_over_six" else TENSOR_MAX
        amax = _finite_amax(w)
        # by a tensor: for a division by a number CUDA multiplies with its inverse, and is an ulp off
        alpha = amax / torch.full_like(amax, reach)
        if method == "amax":
            packed, sf = ops.quantize(w, alpha[..., None])
        else:
            packed, sf = _quantize_searching(w, alpha, method)
        return Nvfp4Tensor(packed, sf, alpha)


@dataclass(frozen=True)
class Mxfp4Tensor:
    """w[.., n, k] = e2m1(packed) * 2^(e8m0 - 127)"""

    packed: Tensor  # [.., N, K/2] uint8, low nibble is the even k
    e8m0: Tensor  # [.., N, K/32] uint8

    @property
    def shape(self) -> torch.Size:
        """The logical shape [.., N, K]."""
        return torch.Size((*self.packed.shape[:-1], 2 * self.packed.shape[-1]))

    def to(self, device) -> "Mxfp4Tensor":
        return replace(self, packed=self.packed.to(device), e8m0=self.e8m0.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scale = e8m0_decode(self.e8m0).repeat_interleave(MX_BLOCK, -1)
        return (e2m1_decode(unpack(self.packed)) * scale).to(dtype)

    def to_nvfp4(self, method: str = "best") -> Nvfp4Tensor:
        """ops.mxfp4_to_nvfp4; a block whose exponent NVFP4 cannot hold is an error."""
        weight = Nvfp4Tensor(*ops.mxfp4_to_nvfp4(self.packed, self.e8m0, method))
        wrong = weight.sf.view(torch.uint8) == E4M3_NAN
        if wrong.any():
            at = wrong.nonzero()[0]
            at[-1] //= MX_BLOCK // BLOCK
            byte = int(self.e8m0[tuple(at.tolist())])
            raise ValueError(f"Mxfp4Tensor.to_nvfp4: e8m0 byte {byte} at {at.tolist()} has no NVFP4 value")
        return weight


def _finite_amax(w: Tensor) -> Tensor:
    """[.., N, K] -> float32 [..]"""
    return torch.where(w.isfinite(), w.float().abs(), 0.0).amax((-1, -2))


def _quantize_searching(
    w: Tensor, alpha: Tensor, method: str, rows_at_once: int = 1024
) -> tuple[Tensor, Tensor]:
    """Per block, the candidate scale with the least squared error; ties go to the first candidate."""
    flat = w.float().unflatten(-1, (-1, BLOCK)).flatten(0, -3)  # [rows, S, 16]
    scales = alpha[..., None].expand(w.shape[:-1]).flatten()  # [rows]
    codes, sfs = [], []
    for rows, scale in zip(flat.split(rows_at_once), scales.split(rows_at_once), strict=True):
        best = None
        for sf in _candidates(rows, scale, method):
            step = (sf.float() * scale[:, None])[..., None]
            code = e2m1_encode((rows / step).nan_to_num(0.0))
            error = _block_sum((e2m1_decode(code) * step - rows).square())
            if best is None:
                best = [error, sf.view(torch.uint8), code]
                continue
            better = error < best[0]
            best[0] = torch.where(better, error, best[0])
            best[1] = torch.where(better, sf.view(torch.uint8), best[1])
            best[2] = torch.where(better[..., None], code, best[2])
        sfs.append(best[1])
        codes.append(best[2])
    packed = pack(torch.cat(codes).flatten(-2)).view(*w.shape[:-1], -1)
    return packed, torch.cat(sfs).view(torch.float8_e4m3fn).view(*w.shape[:-1], -1)


def _block_sum(values: Tensor) -> Tensor:
    """[.., 16] -> [..], in pairs: torch.sum has an order of its own on every device, so that ties between
    scales would fall differently on a GPU."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _candidates(rows: Tensor, scale: Tensor, method: str):
    """Scales float8_e4m3fn [rows, S] to try; the first is the amax rule's, a byte b.

    mse needs no others than b - 7 .. b + 9. Let m be the maximum. Above 2 m / 6 nothing is gained: half that
    scale still reaches m, and its grid holds every step of the coarser one up to there. Below 2/3 of m / 6
    m alone, clipped, loses m^2 / 9, and 15 others gain 15 (m / 12)^2 at most, half a step of b each.
    """
    base = (rows.abs().amax(-1) / (E2M1_MAX * scale[:, None])).nan_to_num(0.0).clamp(2.0**-9, E4M3_MAX)
    yield e4m3_encode(base)
    if method == "four_over_six":
        yield e4m3_encode((1.5 * base).clamp(max=E4M3_MAX))
        return
    byte = e4m3_encode(base).view(torch.uint8).int()
    for offset in range(-7, 10):  # eight bytes to an octave, and b is rounded
        yield (byte + offset).clamp(1, 0x7E).to(torch.uint8).view(torch.float8_e4m3fn)

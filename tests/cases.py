"""Data that can tell right from wrong: random, with scales that differ between rows, experts and halves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_moe import reference
from nvfp4_moe.tensor import Nvfp4Tensor


def random_sf(*shape: int) -> Tensor:
    """All of E4M3's positive finite codes."""
    return torch.randint(1, 0x7F, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


def random_packed(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def lively(*shape: int, dtype=torch.float32) -> Tensor:
    """Rows of very different size."""
    return (torch.randn(shape) * torch.exp(2 * torch.randn(*shape[:-1], 1))).to(dtype)


def ragged_offsets(R: int, E: int) -> Tensor:
    """Random row counts with empty experts among them; together R rows."""
    if E == 0:
        return torch.zeros(1, dtype=torch.int32)
    weights = torch.rand(E) * (torch.rand(E) > 0.3)
    weights[torch.randint(E, ())] += 0.5
    ends = (weights.cumsum(0) / weights.sum() * R).round()
    return torch.cat([torch.zeros(1), ends]).int()


@dataclass
class Weights:
    b: Tensor  # [E, N, K/2]
    sf: Tensor  # [E, N, S] linear
    alpha: Tensor  # [E] or [E, 2]

    @property
    def b_sf(self) -> Tensor:
        return reference.remap_sf(self.sf)

    def dequantized(self, e: int) -> Tensor:
        """Without alpha, float32 [N, K]."""
        return reference.dequantize(self.b[e], self.sf[e], torch.ones(()))


def random_weights(E: int, N: int, K: int, alphas: int = 1) -> Weights:
    """Codes and scales of quantized Gaussian rows of different size, alphas that differ between experts and
    halves."""
    w = Nvfp4Tensor.quantize(lively(E, N, K))
    alpha = torch.exp(torch.randn(E, alphas)) * 2.0**-9
    return Weights(w.packed, w.sf, alpha[:, 0].contiguous() if alphas == 1 else alpha)


def poison(shape, dtype, device="cpu") -> None:
    """Leave NaN bytes in torch's freed memory, so that an output byte nobody writes shows."""
    size = torch.empty(shape, dtype=dtype).numel() * torch.empty((), dtype=dtype).element_size()
    blocks = [torch.full((size,), 0x7F, dtype=torch.uint8, device=device) for _ in range(4)]
    del blocks

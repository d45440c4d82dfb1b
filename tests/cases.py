"""Data that can tell right from wrong: random, with scales that differ between rows, experts and halves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_moe import formats, reference
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


def epilogue_steps(N: int = 72, K: int = 64):
    """Grouped products whose sums are exact, so that ((acc * alpha) * a_scale) + bias is known to the bit:
    products that overflow or lose bits on the way, a bias that leaves nothing. (a, w, offsets, bias, out)"""
    w, offsets = random_weights(1, N, K), torch.tensor([0, K], dtype=torch.int32)
    ones = torch.ones(K, K // 16).to(torch.float8_e4m3fn)
    codes = formats.pack(2 * torch.eye(K, dtype=torch.uint8))  # code 2 is 1
    acc = w.dequantized(0).T + 0.0  # a sum that begins with 0 is never -0
    for alpha, scale in ((2.0**126, 2.0**-100), (2.0**-140, 2.0**120), (0.7, 1.1)):
        w.alpha = torch.tensor([alpha])
        a = codes, ones, torch.full((K,), scale) * torch.rand(K).add(1)
        product = (acc * w.alpha) * a[2][:, None]
        yield a, w, offsets, None, product.bfloat16()
    bias = -product[5][None]
    yield a, w, offsets, bias, (product + bias).bfloat16()


def poison(shape, dtype, device="cpu") -> None:
    """Leave NaN bytes in torch's freed memory, so that an output byte nobody writes shows."""
    size = torch.empty(shape, dtype=dtype).numel() * torch.empty((), dtype=dtype).element_size()
    blocks = [torch.full((size,), 0x7F, dtype=torch.uint8, device=device) for _ in range(4)]
    del blocks

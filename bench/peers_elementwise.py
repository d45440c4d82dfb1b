"""What bench/elementwise.py measures beside our small kernels: the same results' formulas in PyTorch, for
torch.compile, and vLLM's compiled kernels where peers_vllm.py finds them.

Of vLLM 0.33's wheel _moe_C has routing, alignment and un-permutation, _C has silu_and_mul; its FP4 quantizer
is compiled for Blackwell alone."""

import torch
from peers_vllm import align, operators
from torch import Tensor

BLOCK = 16


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).bfloat16()


def swiglu_limit(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate.clamp(max=7)) * up.clamp(-7, 7)).bfloat16()


def quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = scale.expand(x.shape[:-1])[..., None]
    sf = (blocks.abs().amax(-1) / (6 * scale)).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    v = blocks / (sf.float() * scale)[..., None]
    a = v.abs()
    code = (a > 0.25).int() + (a >= 0.75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) + (a > 5)
    code = (code + 8 * torch.signbit(v)).to(torch.uint8).flatten(-2)
    return code[..., ::2] | code[..., 1::2] << 4, sf


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.exp2(torch.ceil(torch.log2(x.float().abs().amax(-1) / 2688)))
    return *quantize(x, scale), scale


def swiglu_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(swiglu(x))


def swiglu_limit_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(swiglu_limit(x))


def dequantize(packed: Tensor, sf: Tensor, scale: Tensor) -> Tensor:
    code = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()
    m = code & 7
    magnitude = torch.where(m < 2, 0.5 * m, torch.exp2((m >> 1) - 1.0) * (1 + 0.5 * (m & 1)))
    blocks = torch.where(code > 7, -magnitude, magnitude).unflatten(-1, (-1, BLOCK)) * sf.float()[..., None]
    return (blocks.flatten(-2) * scale[..., None]).bfloat16()


def remap_sf(sf: Tensor) -> Tensor:
    """Of whole atoms."""
    atoms = sf.view(torch.uint8).unflatten(-2, (-1, 4, 32)).unflatten(-1, (-1, 4))
    return atoms.permute(0, 1, 4, 3, 2, 5).contiguous().view(torch.float8_e4m3fn)


def mxfp4_lossless(packed: Tensor, e8m0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    most = e8m0.amax((-1, -2), keepdim=True).int()
    sf = torch.exp2((e8m0 - most + 8).float()).to(torch.float8_e4m3fn)
    return packed.clone(), sf.repeat_interleave(2, -1), torch.exp2((most - 135).float()).flatten()


def combine(y: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return (y[slots.long()].float() * weights[..., None]).sum(1).bfloat16()


def route(logits: Tensor, bias: None, k: int) -> tuple[Tensor, Tensor]:
    weights, ids = logits.float().softmax(-1).topk(k)
    return weights / weights.sum(-1, keepdim=True), ids


def grouped_route(logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of DeepSeek-V3: four of eight groups, by the sums of their two best."""
    scores = logits.sigmoid()
    groups = (scores + bias).unflatten(-1, (8, -1))
    losing = groups.topk(2).values.sum(-1).topk(4, largest=False).indices
    choice = groups.scatter(1, losing[..., None].expand(-1, -1, groups.shape[-1]), -torch.inf)
    ids = choice.flatten(1).topk(k).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * 2.5, ids


# ---- vLLM's -----------------------------------------------------------------------------------------------


def vllm_swiglu(x: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    operators("_C").silu_and_mul(out, x)
    return out


def vllm_combine(y: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    out = y.new_empty(len(slots), y.shape[1])
    operators().moe_unpermute(y, weights, slots, None, slots.shape[1], out)
    return out


def vllm_route(logits: Tensor, bias: None, k: int) -> tuple[Tensor, Tensor]:
    T = len(logits)
    weights = torch.empty(T, k, device="cuda")
    ids, rows = (torch.empty(T, k, dtype=torch.int32, device="cuda") for _ in range(2))
    operators().topk_softmax(weights, ids, rows, logits, True, None, None)
    return weights, ids


def vllm_grouped_route(logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return operators().grouped_topk(logits, 8, 4, k, True, 2.5, bias, 1)


def vllm_route_and_align(logits: Tensor, bias: None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What its grouped kernels want in place of permute: rows by expert, padded to blocks (of 16 here)."""
    return align(vllm_route(logits, bias, k)[1], logits.shape[1], 16)

"""One weight in each format's tensors: put_*(t, name, w) adds them to `t` and returns the value, float32."""

import torch
from torch import Tensor

from nvfp4_moe import formats, reference


def random_weight(*shape: int, size: float = 0.02) -> Tensor:
    return (torch.randn(shape) * size).bfloat16()


def nvfp4(w: Tensor, amax: Tensor | None = None, scale: Tensor | None = None):
    """w [N, K] -> packed, sf, alpha [], value; alpha is `scale`, or for amax, or for w's own amax."""
    if scale is None:
        scale = reference.tensor_scale(w) if amax is None else amax.float() / 2688
    packed, sf = reference.quantize(w, scale)
    return packed, sf, scale, reference.dequantize(packed, sf, scale, torch.float32)


def mxfp4(w: Tensor):
    """w [.., K] -> packed, e8m0 uint8, value; exponents rounded up, as DeepSeek's quantizer does."""
    blocks = w.float().unflatten(-1, (-1, 32))
    k = torch.ceil(torch.log2(blocks.abs().amax(-1).clamp(min=6 * 2.0**-126) / 6)).int()
    codes = formats.e2m1_encode(blocks * torch.exp2(-k.float())[..., None])
    value = formats.e2m1_decode(codes) * torch.exp2(k.float())[..., None]
    return formats.pack(codes.flatten(-2)), (k + 127).to(torch.uint8), value.flatten(-2)


def fp8_128(w: Tensor):
    """w [N, K] -> float8_e4m3fn, scales float8_e8m0fnu for blocks of 128 x 128."""
    scale = torch.full((-(-w.shape[0] // 128), -(-w.shape[1] // 128)), 127 - 12, dtype=torch.uint8)
    return (w.float() * 2.0**12).clamp(-448, 448).to(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


INPUT_SCALE = 3.0 / 2688


def put_modelopt(t: dict, name: str, w: Tensor, amax=None, inputs: float | None = INPUT_SCALE) -> Tensor:
    packed, sf, alpha, value = nvfp4(w, amax)
    t |= {f"{name}.weight": packed, f"{name}.weight_scale": sf, f"{name}.weight_scale_2": alpha}
    if inputs is not None:
        t[f"{name}.input_scale"] = torch.tensor(inputs)
    return value


def put_ct_nvfp4(t: dict, name: str, w: Tensor, amax=None, inputs: float | None = INPUT_SCALE) -> Tensor:
    divisor = (2688 / (w.float().abs().amax() if amax is None else amax.float())).float()
    packed, sf, _, value = nvfp4(w, scale=divisor.reciprocal())
    t |= {f"{name}.weight_packed": packed, f"{name}.weight_scale": sf}
    t[f"{name}.weight_global_scale"] = divisor.reshape(1)
    if inputs is not None:
        t[f"{name}.input_global_scale"] = torch.tensor([1 / inputs])
    return value


def put_ct_mxfp4(t: dict, name: str, w: Tensor, amax=None) -> Tensor:
    packed, e8m0, value = mxfp4(w)
    t |= {f"{name}.weight_packed": packed, f"{name}.weight_scale": e8m0}
    return value


def put_deepseek(t: dict, name: str, w: Tensor, amax=None) -> Tensor:
    packed, e8m0, value = mxfp4(w)
    t |= {f"{name}.weight": packed.view(torch.int8), f"{name}.scale": e8m0.view(torch.float8_e8m0fnu)}
    return value


def put_quark_mxfp4(t: dict, name: str, w: Tensor, amax=None) -> Tensor:
    packed, e8m0, value = mxfp4(w)
    t |= {f"{name}.weight": packed, f"{name}.weight_scale": e8m0}
    return value


def put_quark_nvfp4(t: dict, name: str, w: Tensor, amax=None) -> Tensor:
    value = put_modelopt(t, name, w, amax, None)
    t[f"{name}.input_scale_2"] = torch.tensor(INPUT_SCALE)
    return value


def put_bf16(t: dict, name: str, w: Tensor, amax=None) -> Tensor:
    t[f"{name}.weight"] = w
    return w.float()


def put_modelopt_w4a16(t: dict, name: str, w: Tensor, amax=None) -> Tensor:
    return put_modelopt(t, name, w, amax, None)


def put_modelopt_awq(t: dict, name: str, w: Tensor, amax=None) -> Tensor:
    t[f"{name}.pre_quant_scale"] = (1 + torch.rand(w.shape[1])).bfloat16()
    return put_modelopt(t, name, w, amax)


def put_modelopt_fp8(t: dict, name: str, w: Tensor, amax=None) -> None:
    """One scale for the tensor, as MIXED_PRECISION keeps attention."""
    scale = w.float().abs().amax() / 448
    t |= {f"{name}.weight": (w.float() / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}
    t[f"{name}.input_scale"] = torch.tensor(0.01)


def put_modelopt_stacked(t: dict, name: str, w: Tensor) -> Tensor:
    """[E, N, K] stored [E, K/2, N], one scale for all experts."""
    amax = w.float().abs().amax()
    parts = [nvfp4(one, amax) for one in w]
    packed, sf = (torch.stack([p[i].view(torch.uint8) for p in parts]).transpose(1, 2) for i in (0, 1))
    t |= {name: packed.contiguous(), f"{name}_weight_scale": sf.contiguous().view(torch.float8_e4m3fn)}
    t |= {f"{name}_weight_scale_2": parts[0][2], f"{name}_input_scale": torch.tensor(INPUT_SCALE)}
    t[f"{name}_bias"] = random_weight(*w.shape[:2])
    return torch.stack([p[3] for p in parts])


def put_modelopt_stacked_no_bias(t: dict, name: str, w: Tensor) -> Tensor:
    value = put_modelopt_stacked(t, name, w)
    del t[f"{name}_bias"]
    return value


def put_gpt_oss(t: dict, name: str, w: Tensor) -> Tensor:
    packed, e8m0, value = mxfp4(w)
    t |= {f"{name}_blocks": packed.unflatten(-1, (-1, 16)), f"{name}_scales": e8m0}
    t[f"{name}_bias"] = random_weight(*w.shape[:2])
    return value


def put_gpt_oss_original(t: dict, name: str, w: Tensor) -> Tensor:
    packed, e8m0, value = mxfp4(w)
    t |= {f"{name}.blocks": packed.unflatten(-1, (-1, 16)), f"{name}.scales": e8m0}
    t[f"{name.removesuffix('weight')}bias"] = random_weight(*w.shape[:2])
    return value


def put_ct_nvfp4a16(t: dict, name: str, w: Tensor, amax=None) -> Tensor:
    return put_ct_nvfp4(t, name, w, amax, None)

"""Tiny checkpoints in every format, with the names, types and shapes of the real ones. Deterministic.

    truth = make(path, "modelopt")  # writes a directory; truth.values[module]: float32 [.., N, K]

Files are written here by hand and not with the library's writer, so that the two can be held against each
other.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import checkpoint_models as models
import checkpoint_weights as weights
import torch
from checkpoint_models import LAYERS
from torch import Tensor

DTYPES = {
    torch.bfloat16: "BF16", torch.float64: "F64", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.int64: "I64", torch.int32: "I32",
    torch.float4_e2m1fn_x2: "F4", torch.bool: "BOOL",
}  # fmt: skip


@dataclass
class Truth:
    path: Path
    tensors: dict[str, Tensor]  # what was written
    config: dict
    values: dict[str, Tensor] = field(default_factory=dict)  # module -> weight, float32 [.., N, K]
    moe: list[str] = field(default_factory=list)  # prefixes of MoE blocks


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> None:
    header, blobs, at = {}, [], 0
    if metadata:
        header["__metadata__"] = metadata
    for name, tensor in tensors.items():
        blob = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        shape = list(tensor.shape)
        if tensor.dtype == torch.float4_e2m1fn_x2:
            shape[-1] *= 2
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [at, at + len(blob)]}
        at += len(blob)
        blobs.append(blob)
    write_raw(path, json.dumps(header).encode(), b"".join(blobs))


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_directory(
    path: Path, tensors: dict[str, Tensor], config: dict, shards: int = 1, index=True
) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        write_file(path / "model.safetensors", tensors, {"format": "pt"})
    else:
        where, step = {}, -(-len(names) // shards)
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[i * step : (i + 1) * step]}
            write_file(path / file, part, {"format": "pt"})
            where |= dict.fromkeys(part, file)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        if index:
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": where})
            (path / "model.safetensors.index.json").write_text(text)
    (path / "config.json").write_text(json.dumps(config, indent=2))


CT_FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
CT = {
    "nvfp4-pack-quantized": (
        CT_FLOAT4 | {"group_size": 16, "strategy": "tensor_group", "dynamic": False},
        CT_FLOAT4 | {"group_size": 16, "strategy": "tensor_group", "dynamic": "local"},
    ),
    "mxfp4-pack-quantized": (
        CT_FLOAT4 | {"group_size": 32, "strategy": "group", "dynamic": False, "scale_dtype": "torch.uint8"},
        CT_FLOAT4 | {"group_size": 32, "strategy": "group", "dynamic": True, "scale_dtype": "torch.uint8"},
    ),
}


def ct_config(
    form: str, inputs: bool = True, ignore=("lm_head", "re:.*self_attn.*", "re:.*mlp.gate$")
) -> dict:
    weights, activations = CT[form]
    group = {"targets": ["Linear"], "format": form, "weights": weights, "output_activations": None}
    group["input_activations"] = activations if inputs else None
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": list(ignore), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


EXCLUDED = ("lm_head", "*self_attn*", "*mlp.gate")


def remade(truth: Truth, path: Path, drop=(), config=None, **tensors: Tensor) -> Path:
    """The checkpoint again, in one file, with tensors dropped or exchanged."""
    kept = {name: t for name, t in truth.tensors.items() if name not in drop} | tensors
    write_directory(path, kept, truth.config if config is None else config)
    return path


def modelopt_config(algo="NVFP4", ignore=EXCLUDED, **more) -> dict:
    scheme = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    inputs = None if algo == "W4A16_NVFP4" else scheme
    group = {"weights": scheme, "input_activations": inputs, "targets": ["Linear"]}
    return {
        "quant_method": "modelopt", "quant_algo": algo, "config_groups": {"group_0": group},
        "ignore": list(ignore), "producer": {"name": "modelopt", "version": "0.47.0"}, **more,
    }  # fmt: skip


def write_hf_quant_config(path: Path, algo="NVFP4", excluded=EXCLUDED, **more) -> None:
    quantization = {
        "quant_algo": algo, "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": list(excluded),
    } | more  # fmt: skip
    text = json.dumps({"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization})
    (path / "hf_quant_config.json").write_text(text)


FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip
ONE_LAYER = {"quant_algo": "NVFP4", "group_size": 16}
MIXED = {f"model.layers.{i}.mlp.experts": ONE_LAYER for i in range(1, LAYERS)}
MIXED |= {f"model.layers.{i}.mlp.shared_experts": ONE_LAYER for i in range(1, LAYERS)}
V4_NVFP4 = FP8 | {
    "moe_quant_algo": "NVFP4", "quant_algo": "MIXED_PRECISION", "group_size": 16,
    "quantized_layers": {f"layers.{i}.ffn.experts": ONE_LAYER for i in range(LAYERS)},
    "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
}  # fmt: skip
OSS_KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
OSS = {"quant_method": "mxfp4", "modules_to_not_convert": OSS_KEPT}
QUARK = {
    "quant_method": "quark", "exclude": ["lm_head", "*self_attn*", "*mlp.gate"],
    "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}, "input_tensors": {"dtype": "fp4"}},
}  # fmt: skip
STACKED = ("{b}.experts.gate_up_proj", "{b}.experts.down_proj")
ORIGINAL = ("{b}.mlp1_weight", "{b}.mlp2_weight")

W4A16 = modelopt_config("W4A16_NVFP4")
MIXED_PRECISION = modelopt_config("MIXED_PRECISION", quantized_layers=MIXED)
SHARED_KEPT = modelopt_config(ignore=(*EXCLUDED, "*.shared_expert*"))
CT_NVFP4, CT_NVFP4A16 = ct_config("nvfp4-pack-quantized"), ct_config("nvfp4-pack-quantized", False)
CT_MXFP4, CT_MXFP4A16 = ct_config("mxfp4-pack-quantized"), ct_config("mxfp4-pack-quantized", False)

# form -> model, how an expert's weight is stored, quantization_config
FORMS = {
    "modelopt": (models.QWEN3_MOE, weights.put_modelopt, modelopt_config()),
    "modelopt-w4a16": (models.QWEN3_MOE, weights.put_modelopt_w4a16, W4A16),
    "modelopt-mixed": (models.DEEPSEEK_V3, weights.put_modelopt, MIXED_PRECISION),
    "modelopt-awq": (models.QWEN3, weights.put_modelopt_awq, modelopt_config("NVFP4_AWQ")),
    "modelopt-minimax": (models.MINIMAX_M2, weights.put_modelopt, modelopt_config()),
    "modelopt-nemotron": (models.NEMOTRON_H, weights.put_modelopt, SHARED_KEPT),
    "modelopt-llama4": (models.LLAMA4, weights.put_modelopt_stacked_no_bias, SHARED_KEPT),
    "modelopt-gpt-oss": (models.GPT_OSS, weights.put_modelopt_stacked, modelopt_config()),
    "compressed-tensors-nvfp4": (models.QWEN3_MOE, weights.put_ct_nvfp4, CT_NVFP4),
    "compressed-tensors-nvfp4a16": (models.QWEN3_MOE, weights.put_ct_nvfp4a16, CT_NVFP4A16),
    "compressed-tensors-mxfp4": (models.QWEN3_MOE, weights.put_ct_mxfp4, CT_MXFP4),
    "kimi-k3": (models.MINIMAX_M2, weights.put_ct_mxfp4, CT_MXFP4A16),
    "gpt-oss": (models.GPT_OSS, weights.put_gpt_oss, OSS),
    "gpt-oss-original": (models.GPT_OSS_ORIGINAL, weights.put_gpt_oss_original, None),
    "deepseek-v4": (models.DEEPSEEK_V4, weights.put_deepseek, FP8),
    "deepseek-v4-nvfp4": (models.DEEPSEEK_V4, weights.put_modelopt, V4_NVFP4),
    "deepseek-v4-nvfp4-hf": (models.DEEPSEEK_V3, weights.put_modelopt, V4_NVFP4),
    "quark-mxfp4": (models.QWEN3_MOE, weights.put_quark_mxfp4, QUARK),
    "quark-nvfp4": (models.QWEN3_MOE, weights.put_quark_nvfp4, QUARK),
    "bf16": (models.QWEN3_MOE, weights.put_bf16, None),
}


def make(
    path,
    form: str,
    shards=1,
    seed=0,
    index=True,
    mismatched=False,
    sizes=(models.H, models.I, models.E),
    layers=LAYERS,
) -> Truth:
    """mismatched: gate and up have their own scales; sizes: hidden, intermediate, experts."""
    path, (model, put, quantization) = Path(path), FORMS[form]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t, values, blocks = models.rest_of(model, sizes, layers), {}, models.blocks_of(model, layers)
        for block in blocks:
            if form in ("gpt-oss", "gpt-oss-original", "modelopt-llama4", "modelopt-gpt-oss"):
                names = tuple(
                    n.format(b=block) for n in (ORIGINAL if form == "gpt-oss-original" else STACKED)
                )
                models.put_stacked(t, values, put, names, "oss" in form, sizes)
            else:
                way = weights.put_deepseek if block.startswith("mtp") else put
                models.put_experts(t, values, block, way, model.parts, mismatched, sizes)
        _quantize_more(t, values, form)
    config = models.config_of(model, sizes, layers) if model.config else {}
    config |= {"expert_dtype": "fp4"} if form == "deepseek-v4" else {}
    if form == "deepseek-v4-nvfp4-hf":
        config["model_type"] = "deepseek_v4"
    if form == "kimi-k3":
        t, values, blocks = _prefixed("language_model.", t, values, blocks)
        config = {"model_type": "kimi_k3", "text_config": config}
    if quantization:
        config["quantization_config"] = quantization
    write_directory(path, t, config, shards, index)
    if form.startswith("modelopt"):
        layers = {k: quantization[k] for k in ("quantized_layers",) if k in quantization}
        write_hf_quant_config(path, quantization["quant_algo"], quantization["ignore"], **layers)
    return Truth(path, t, config, values, blocks)


def _quantize_more(t: dict, values: dict, form: str) -> None:
    """Linears beside the routed experts that some exports quantize too."""
    pairs = {}
    put = {
        "modelopt-awq": [("_proj", ".mlp.", weights.put_modelopt_awq)],
        "modelopt-mixed": [
            ("_proj", ".shared_experts.", weights.put_modelopt),
            ("o_proj", "", weights.put_modelopt_fp8),
        ],
        "deepseek-v4-nvfp4-hf": [("_proj", ".self_attn.", weights.put_modelopt)],
    }.get(form, [])
    for suffix, within, way in put:
        for name in [
            n for n in t if n.endswith(f"{suffix}.weight") and within in n and t[n].dtype == torch.bfloat16
        ]:
            module, w = name.removesuffix(".weight"), t.pop(name)
            amax = w.abs().amax()
            for one, other in (
                ("gate_proj", "up_proj"),
                ("up_proj", "gate_proj"),
            ):  # as exporters do: one for both
                if module.endswith(one):
                    amax = pairs.setdefault(
                        module.removesuffix(one), amax.maximum(_amax(t, module, one, other))
                    )
            value = way(t, module, w, amax)
            if value is not None:
                values[module] = value


def _amax(t: dict, module: str, one: str, other: str) -> Tensor:
    """Of the other half of a gate and up pair; 0 where there is none."""
    pair = t.get(module.removesuffix(one) + other + ".weight")
    return torch.tensor(0.0) if pair is None or not pair.is_floating_point() else pair.abs().amax()


def _prefixed(prefix: str, t: dict, values: dict, blocks: list[str]):
    return (
        {prefix + k: v for k, v in t.items()},
        {prefix + k: v for k, v in values.items()},
        [prefix + b for b in blocks],
    )

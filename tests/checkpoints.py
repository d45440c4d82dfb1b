"""Tiny checkpoints in every format, with the names, types and shapes of the real ones. Deterministic.

    truth = make(path, "modelopt")  # writes a directory; truth.values[module]: float32 [.., N, K]

Files are written here by hand and not with the library's writer, so that the two can be held against each
other.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoint_models import deepseek_v4, gpt_oss, qwen3_moe
from checkpoint_weights import put_bf16, put_deepseek, put_modelopt
from torch import Tensor

DTYPES = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.int64: "I64", torch.int32: "I32",
    torch.float4_e2m1fn_x2: "F4",
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


def modelopt_config(
    config: dict, algo="NVFP4", ignore=("lm_head", "*self_attn*", "*mlp.gate"), **more
) -> dict:
    scheme = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    inputs = None if algo == "W4A16_NVFP4" else scheme
    group = {"weights": scheme, "input_activations": inputs, "targets": ["Linear"]}
    quantization = {
        "quant_method": "modelopt", "quant_algo": algo, "config_groups": {"group_0": group},
        "ignore": list(ignore), "producer": {"name": "modelopt", "version": "0.47.0"}, **more,
    }  # fmt: skip
    return config | {"quantization_config": quantization}


def write_hf_quant_config(path: Path, algo="NVFP4", excluded=()) -> None:
    quantization = {
        "quant_algo": algo, "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": list(excluded),
    }  # fmt: skip
    text = json.dumps({"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization})
    (path / "hf_quant_config.json").write_text(text)


def _modelopt(path, **options):
    t, config, values, moe = qwen3_moe(put_modelopt, **options)
    return t, modelopt_config(config), values, moe


def _deepseek_v4(path, **options):
    return deepseek_v4(put_deepseek, **options)


def _gpt_oss(path, **options):
    return gpt_oss(**options)


def _bf16(path, **options):
    return qwen3_moe(put_bf16, **options)


MAKERS = {"modelopt": _modelopt, "deepseek-v4": _deepseek_v4, "gpt-oss": _gpt_oss, "bf16": _bf16}


def make(path, form: str, shards: int = 1, seed: int = 0, index: bool = True, **options) -> Truth:
    """options: mismatched (gate and up with their own scales), sizes (H, I, E), layers."""
    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors, config, values, moe = MAKERS[form](path, **options)
    write_directory(path, tensors, config, shards, index)
    if form.startswith("modelopt"):
        quantization = config["quantization_config"]
        write_hf_quant_config(path, quantization["quant_algo"], quantization["ignore"])
    return Truth(path, tensors, config, values, moe)

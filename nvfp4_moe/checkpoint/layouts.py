"""How converters name NVFP4 tensors in a new checkpoint, and what its configs then say.

modelopt and compressed-tensors: names and conventions are those of the readers' table (dialects.py).
deepseek-v4: ModelOpt's names, with the config of its own export of that model, which keeps FP8 layers.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import BLOCK
from ..tensor import Nvfp4Tensor
from .claims import quantization, text_config
from .dialects import DIALECTS, Dialect
from .header import CheckpointError
from .names import natural, starred
from .patterns import matches

Planned = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape
# as ModelOpt's export of that model says
DEEPSEEK_V4_IGNORES = ("*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*")
FP8_KV = {"dynamic": False, "num_bits": 8, "type": "float"}  # as ModelOpt says it in config.json
CT_FP8_KV = {"strategy": "tensor", "symmetric": True}  # what compressed-tensors says besides
# engines look for this name and refuse others
PRODUCER = {"name": "modelopt", "version": "0.47.0 (as written by nvfp4_moe)"}


@dataclass(frozen=True)
class Layout:
    name: str
    dialect: Dialect
    scalar: tuple[int, ...]  # shape of alpha and input_scale

    def planned(self, module: str, N: int, K: int, input_scale: bool) -> list[Planned]:
        d = self.dialect
        tensors = [
            (module + d.packed, "U8", (N, K // 2)),
            (module + d.scale, "F8_E4M3", (N, K // BLOCK)),
            (module + d.alpha, "F32", self.scalar),
        ]
        return tensors + [(module + d.input_scale[0], "F32", self.scalar)] * input_scale

    def stored(
        self, module: str, weight: Nvfp4Tensor, input_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        d, alpha = self.dialect, weight.alpha
        if d.inverse and not alpha.any() and not (weight.packed & 0x77).any():
            alpha = torch.ones_like(alpha)  # 0 has no inverse; for zeros 1 is what compressed-tensors writes
        tensors = {
            module + d.packed: weight.packed,
            module + d.scale: weight.sf,
            module + d.alpha: self._scalar(module, alpha),
        }
        if input_scale is not None:
            tensors[module + d.input_scale[0]] = self._scalar(module, input_scale)
        return tensors

    def _scalar(self, module: str, multiplier: Tensor) -> Tensor:
        """In the file's convention: compressed-tensors stores 1 / x, which is exact for powers of two."""
        value = multiplier.reciprocal() if self.dialect.inverse else multiplier
        if not value.isfinite().all():
            raise CheckpointError(
                f"{module}: scale {float(multiplier):g} has no float32 inverse, which {self.name} stores"
            )
        return value.float().reshape(self.scalar).cpu()


def _named(name: str) -> Dialect:
    return next(d for d in DIALECTS if d.name == name and d.packed)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("modelopt", _named("modelopt-nvfp4"), ()),
        Layout("compressed-tensors", _named("compressed-tensors-nvfp4"), (1,)),
        Layout("deepseek-v4", _named("modelopt-nvfp4"), ()),
    )
}


# ---- configs --------------------------------------------------------------------------------------------


def config_files(
    layout: Layout, config: dict, quant_config: dict | None, modules: Iterable[str], plain: Iterable[str],
    activations: bool,
) -> dict[str, bytes]:  # fmt: skip
    """config.json and, for ModelOpt's, hf_quant_config.json. modules: those in NVFP4; plain: unquantized
    ones; activations: input scales are stored, so engines may quantize activations too."""
    modules, plain = list(modules), list(plain)
    ignored = unquantized_patterns(modules, plain)
    old, kv = quantization(config), kv_cache(config, quant_config)
    algo = "NVFP4" if activations else "W4A16_NVFP4"
    if layout.name == "compressed-tensors":
        new = _compressed_tensors(ignored, activations, {**FP8_KV, **CT_FP8_KV} if kv == "FP8" else None)
    elif layout.name == "deepseek-v4":
        new = _deepseek_v4(old, modules, algo)
        new["ignore"] = [p for p in DEEPSEEK_V4_IGNORES if any(matches(p, name) for name in plain)]
    else:
        new = {"quant_method": "modelopt", "quant_algo": algo, "config_groups": _groups(activations)}
        new |= {"ignore": ignored, "producer": PRODUCER}
        if kv:
            new["kv_cache_scheme"] = FP8_KV if kv == "FP8" else kv
    files = {"config.json": {**config, "quantization_config": new}}
    if "quantization_config" in text_config(config):  # of the source's format
        inner = {k: v for k, v in text_config(config).items() if k != "quantization_config"}
        files["config.json"]["text_config"] = inner
    if layout.name == "modelopt":
        said = {
            "quant_algo": algo,
            "kv_cache_quant_algo": kv,
            "group_size": BLOCK,
            "exclude_modules": ignored,
        }
        files["hf_quant_config.json"] = {"producer": PRODUCER, "quantization": said}
    return {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in files.items()}


def kv_cache(config: dict, quant_config: dict | None) -> str | None:
    """How the KV cache is quantized, in ModelOpt's words (FP8, NVFP4, ..), whoever says it and how."""
    said = ((quant_config or {}).get("quantization") or {}).get("kv_cache_quant_algo")
    scheme = quantization(config).get("kv_cache_scheme")
    if isinstance(scheme, dict) and not said:
        kind = {"float": "FP", "int": "INT"}.get(scheme.get("type"), "")
        return f"{kind}{scheme.get('num_bits')}"
    said = said or scheme
    return str(said).upper() if said else None


def _groups(activations: bool) -> dict:
    scheme = {"num_bits": 4, "type": "float", "group_size": BLOCK, "dynamic": False}
    inputs = scheme if activations else None
    return {"group_0": {"weights": scheme, "input_activations": inputs, "targets": ["Linear"]}}


def _deepseek_v4(old: dict, modules: list[str], algo: str) -> dict:
    experts = sorted({re.sub(r"\.experts\..*", ".experts", m) for m in modules}, key=natural)
    return {
        "quant_method": "fp8",
        **old,
        "moe_quant_algo": algo,
        "quant_algo": "MIXED_PRECISION",
        "group_size": BLOCK,
        "config_groups": _groups(algo == "NVFP4"),
        "quantized_layers": {name: {"quant_algo": algo, "group_size": BLOCK} for name in experts},
        "producer": PRODUCER,
    }


def _compressed_tensors(ignored: list[str], activations: bool, kv_cache_scheme) -> dict:
    scheme = {
        "num_bits": 4, "type": "float", "symmetric": True, "group_size": BLOCK, "strategy": "tensor_group",
        "dynamic": False, "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    inputs = {**scheme, "dynamic": "local", "observer": "static_minmax"} if activations else None
    group = {
        "targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": scheme,
        "input_activations": inputs, "output_activations": None,
    }  # fmt: skip
    regex = [p if "*" not in p else "re:^" + re.escape(p).replace(r"\*", r"[^.]+") + "$" for p in ignored]
    return {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": group}, "ignore": regex,
        "kv_cache_scheme": kv_cache_scheme, "global_compression_ratio": None,
    }  # fmt: skip


def unquantized_patterns(modules: Iterable[str], plain: Iterable[str]) -> list[str]:
    """Unquantized modules with `*` for their numbers, or in full where `*` would hit a quantized one."""
    taken = {starred(m) for m in modules}
    taken_examples = {t.replace("*", "0") for t in taken}
    found: dict[str, None] = {}
    for name in plain:
        star = starred(name)
        clash = star in taken or any(matches(star, example) for example in taken_examples)
        found[name if clash else star] = None
    return sorted(found, key=natural)


def matrices(tensors: Mapping) -> list[str]:
    """Modules with a matrix `.weight`: what an engine may take for quantized unless told. More than linears:
    an embedding too many in an ignore list does no harm."""
    return [
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) >= 2
    ]

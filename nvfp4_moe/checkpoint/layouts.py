"""How converters name NVFP4 tensors in a new checkpoint, and what its configs then say.

modelopt and compressed-tensors: names and conventions are those of the readers' table (dialects.py).
deepseek-v4: ModelOpt's names, with the config of its own export of that model, which keeps FP8 layers.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..formats import BLOCK
from ..tensor import Nvfp4Tensor
from .claims import matches
from .dialects import DIALECTS, Dialect
from .header import CheckpointError

Planned = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape
FUSED = (  # last parts of names that engines multiply at once
    ("gate_proj", "up_proj"), ("w1", "w3"), ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)  # fmt: skip
FUSED_WITH = {name: names for names in FUSED for name in names}
# as ModelOpt's export of that model says
DEEPSEEK_V4_IGNORES = ("*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*")
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
        d = self.dialect
        tensors = {
            module + d.packed: weight.packed,
            module + d.scale: weight.sf,
            module + d.alpha: self._scalar(module, weight.alpha),
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


def fused_groups(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Modules {name: (N, K)} that share an alpha, in the order of FUSED; every module stands in one group."""
    groups: dict[tuple, list[str]] = {}
    for name, (_, K) in shapes.items():
        parent, _, last = name.rpartition(".")
        key = (parent, FUSED_WITH[last], K) if last in FUSED_WITH else (name,)
        groups.setdefault(key, []).append(name)
    for key, group in groups.items():
        if len(key) == 3:
            group.sort(key=lambda name: key[1].index(name.rpartition(".")[2]))
    return list(groups.values())


# ---- configs --------------------------------------------------------------------------------------------


def config_files(
    layout: Layout, config: dict, quant_config: dict | None, modules: Iterable[str], plain: Iterable[str],
    activations: bool,
) -> dict[str, bytes]:  # fmt: skip
    """config.json and, for ModelOpt's, hf_quant_config.json. modules: those in NVFP4; plain: unquantized
    ones; activations: input scales are stored, so engines may quantize activations too."""
    modules, plain = list(modules), list(plain)
    ignored = unquantized_patterns(modules, plain)
    old = config.get("quantization_config") or {}
    kv = ((quant_config or {}).get("quantization") or {}).get("kv_cache_quant_algo")
    algo = "NVFP4" if activations else "W4A16_NVFP4"
    if layout.name == "compressed-tensors":
        new = _compressed_tensors(ignored, activations, old.get("kv_cache_scheme"))
    elif layout.name == "deepseek-v4":
        new = _deepseek_v4(old, modules, algo)
        new["ignore"] = [p for p in DEEPSEEK_V4_IGNORES if any(matches(p, name) for name in plain)]
    else:
        new = {"quant_method": "modelopt", "quant_algo": algo, "config_groups": _groups(activations)}
        new |= {"ignore": ignored, "producer": PRODUCER}
        if kv:
            new["kv_cache_scheme"] = old.get("kv_cache_scheme") or kv
    files = {"config.json": {**config, "quantization_config": new}}
    if layout.name == "modelopt":
        said = {
            "quant_algo": algo,
            "kv_cache_quant_algo": kv,
            "group_size": BLOCK,
            "exclude_modules": ignored,
        }
        files["hf_quant_config.json"] = {"producer": PRODUCER, "quantization": said}
    return {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in files.items()}


def _groups(activations: bool) -> dict:
    scheme = {"num_bits": 4, "type": "float", "group_size": BLOCK, "dynamic": False}
    inputs = scheme if activations else None
    return {"group_0": {"weights": scheme, "input_activations": inputs, "targets": ["Linear"]}}


def _deepseek_v4(old: dict, modules: list[str], algo: str) -> dict:
    experts = sorted({re.sub(r"\.experts\..*", ".experts", m) for m in modules}, key=_natural)
    return {
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
    taken = {_starred(m) for m in modules}
    taken_examples = {t.replace("*", "0") for t in taken}
    found: dict[str, None] = {}
    for name in plain:
        star = _starred(name)
        clash = star in taken or any(matches(star, example) for example in taken_examples)
        found[name if clash else star] = None
    return sorted(found, key=_natural)


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _natural(name: str) -> list:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def linear_names(tensors: Mapping) -> list[str]:
    """Modules with a matrix `.weight`: what an engine may take for a quantized linear unless told."""
    return [
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) >= 2
    ]

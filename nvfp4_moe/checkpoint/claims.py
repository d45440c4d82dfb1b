"""What config.json and hf_quant_config.json claim about the quantization; never believed before the
tensors."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from .header import CheckpointError
from .patterns import Entries

# quant_method -> formats whose tensors may stand behind it
METHODS = {
    "modelopt": ("modelopt-nvfp4",),
    "compressed-tensors": ("compressed-tensors-nvfp4", "compressed-tensors-mxfp4"),
    "mxfp4": ("gpt-oss-mxfp4",),
    "fp8": ("deepseek-v4-fp4", "deepseek-v4-nvfp4"),
    "quark": ("quark-mxfp4", "quark-nvfp4"),
}
WEIGHTS_ONLY = ("W4A16_NVFP4", "W4A8_NVFP4_FP8")  # in FP4; FP8 activations run as BF16, which loses nothing


@dataclass
class Claims:
    method: str | None = None  # quant_method
    algo: str | None = None  # ModelOpt's quant_algo, upper case
    group_size: int | None = None
    excluded: tuple[str, ...] = ()  # names, globs or re:patterns of modules left in high precision
    layers: dict[str, dict] = field(
        default_factory=dict
    )  # quantized_layers: module -> {quant_algo, group_size}
    groups: list[dict] = field(default_factory=list)  # config_groups
    weights_only: bool | None = None  # None: the configs do not say

    def excludes(self, module: str) -> str | None:
        """The entry that says this module is not quantized, or None."""
        return self.exclusions.first_match(module)

    @cached_property
    def exclusions(self) -> Entries:
        return Entries(self.excluded)

    @cached_property
    def targets(self) -> Entries:
        """Of all config_groups: one list, for what a list may cost is bounded."""
        return Entries(t for group in self.groups for t in targets(group) if not is_class(t))

    def compute(self, module: str, kind: str, has_input_scale: bool) -> str:
        """nvfp4 | bf16 for one module, from the narrowest claim there is."""
        if self.method == "fp8" and kind == "mxfp4":
            return "bf16"  # DeepSeek-V4's own experts: FP8 activations, which BF16 holds
        names = _ancestors(module) if self.layers else ()
        layer = next((self.layers[name] for name in names if name in self.layers), None)
        if isinstance(layer, dict) and layer.get("quant_algo"):
            return "bf16" if str(layer["quant_algo"]).upper() in WEIGHTS_ONLY else "nvfp4"
        if self.algo in WEIGHTS_ONLY or self.weights_only:
            return "bf16"
        fitting = set(self.targets.every_match(module)) if self.groups else ()
        group = next((g for g in self.groups if any(is_class(t) or t in fitting for t in targets(g))), None)
        if group is not None:
            activations = group.get("input_activations")
            return (
                "nvfp4" if isinstance(activations, dict) and activations.get("num_bits", 4) == 4 else "bf16"
            )
        if self.algo is not None or self.weights_only is not None:
            return "nvfp4"
        return "nvfp4" if has_input_scale else "bf16"


def text_config(config: dict) -> dict:
    """Of a model that sees and hears as well: what it says about its language model."""
    return _dict(config.get("text_config"))


def quantization(config: dict) -> dict:
    said = config.get("quantization_config") or text_config(config).get("quantization_config") or {}
    if not isinstance(said, dict):
        raise CheckpointError("config.json: quantization_config must be an object")
    return said


def is_gpt_oss(config: dict) -> bool:
    """Its stacked experts have gate in rows 0::2 and up in rows 1::2. Nobody can tell from the numbers."""
    return "gpt_oss" in model_types(config)


def model_types(config: dict) -> set[str]:
    types = config.get("model_type"), text_config(config).get("model_type")
    return {t for t in types if isinstance(t, str)}


def read_claims(config: dict, quant_config: dict | None) -> Claims:
    """config.json's quantization_config first; ModelOpt's old hf_quant_config.json fills what it leaves
    open."""
    said, legacy = quantization(config), (quant_config or {}).get("quantization") or {}
    if not isinstance(legacy, dict):
        raise CheckpointError("hf_quant_config.json: quantization must be an object")
    method = said.get("quant_method") or ("modelopt" if legacy else None)
    claims = Claims(method=str(method).lower() if method else None)
    algo = said.get("moe_quant_algo") or said.get("quant_algo") or legacy.get("quant_algo")
    claims.algo = str(algo).upper() if algo else None
    claims.layers = _dict(said.get("quantized_layers") or legacy.get("quantized_layers"))
    claims.groups = [g for g in _dict(said.get("config_groups")).values() if isinstance(g, dict)]
    weights = [g.get("weights") for g in claims.groups if isinstance(g.get("weights"), dict)]
    sizes = [said.get("group_size"), legacy.get("group_size"), *(w.get("group_size") for w in weights)]
    claims.group_size = next((size for size in sizes if isinstance(size, int) and size), None)
    excluded = said.get("ignore") or said.get("modules_to_not_convert") or said.get("exclude")
    claims.excluded = tuple(_names(excluded or legacy.get("exclude_modules")))
    if claims.method == "modelopt" and claims.groups:
        claims.weights_only = all(not g.get("input_activations") for g in claims.groups) or None
    if claims.method == "mxfp4" or (claims.method == "fp8" and not said.get("moe_quant_algo")):
        claims.weights_only = True  # gpt-oss computes in BF16, DeepSeek-V4 in FP8
    if claims.method == "quark":
        activations = _dict(said.get("global_quant_config")).get("input_tensors")
        claims.weights_only = not activations
    return claims


def targets(group: dict) -> list[str]:
    return _names(group.get("targets"))


def is_class(target: str) -> bool:
    """Linear, say, and no name or pattern: it fits every quantized module."""
    return target[:1].isupper()


def _ancestors(module: str) -> Iterable[str]:
    parts = module.split(".")
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def _names(value) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}

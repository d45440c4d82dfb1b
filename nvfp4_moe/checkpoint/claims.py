"""What config.json and hf_quant_config.json claim about the quantization; never believed before the
tensors."""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property, lru_cache

from .header import CheckpointError

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
        return self._entries.first_match(module)

    @cached_property
    def _entries(self) -> "Entries":
        return Entries(self.excluded)

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
        group = next((g for g in self.groups if _targets(g, module)), None)
        if group is not None:
            activations = group.get("input_activations")
            return (
                "nvfp4" if isinstance(activations, dict) and activations.get("num_bits", 4) == 4 else "bf16"
            )
        if self.algo is not None or self.weights_only is not None:
            return "nvfp4"
        return "nvfp4" if has_input_scale else "bf16"


def read_claims(config: dict, quant_config: dict | None) -> Claims:
    """config.json's quantization_config first; ModelOpt's old hf_quant_config.json fills what it leaves
    open."""
    inner = config.get("text_config")
    said = config.get("quantization_config") or (inner or {}).get("quantization_config") or {}
    legacy = (quant_config or {}).get("quantization") or {}
    if not isinstance(said, dict) or not isinstance(legacy, dict):
        raise CheckpointError("config: quantization_config must be an object")
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


class Entries:
    """Names, globs and re:patterns of modules. A name fits every module that has it as a run of its parts, as
    in vLLM and SGLang. Names are looked up and not searched: a model has 250,000 modules and 500 entries."""

    def __init__(self, entries: Iterable[str]):
        self.literal, self.patterns = set(), []
        for entry in entries:
            if entry.startswith("re:"):
                with suppress(re.error):
                    self.patterns.append(("", re.compile(entry[3:]), entry))
            elif any(c in entry for c in "*?["):
                start = re.split(r"[*?\[]", entry, maxsplit=1)[0]
                self.patterns.append((start, re.compile(translate(entry)), entry))
            else:
                self.literal.add(entry)
        self.first_parts = {name.split(".")[0] for name in self.literal}

    def first_match(self, module: str) -> str | None:
        if self.literal:
            parts = module.split(".")
            starts = [i for i, part in enumerate(parts) if part in self.first_parts]
            runs = (".".join(parts[i:j]) for i in starts for j in range(i + 1, len(parts) + 1))
            if found := next((run for run in runs if run in self.literal), None):
                return found
        hits = (entry for start, p, entry in self.patterns if module.startswith(start) and p.match(module))
        return next(hits, None)


@lru_cache(1024)
def _entry(entry: str) -> Entries:
    return Entries([entry])


def matches(entry: str, module: str) -> bool:
    return _entry(entry).first_match(module) is not None


def _targets(group: dict, module: str) -> bool:
    # a target is a class (Linear), a name or a pattern; a class fits every quantized module
    return any(t[:1].isupper() or matches(t, module) for t in _names(group.get("targets")))


def _ancestors(module: str) -> Iterable[str]:
    parts = module.split(".")
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def _names(value) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}

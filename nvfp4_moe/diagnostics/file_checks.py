"""Checks that need headers and configs only: the index, the set of tensors, expert counts, KV scales, the
config."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable

from ..checkpoint import Checkpoint, Shards
from ..checkpoint.claims import METHODS, is_class, quantization, targets, text_config
from ..checkpoint.dialects import DIALECTS, NVFP4
from ..checkpoint.header import FLOATS
from ..checkpoint.names import EXPERT, PART, WITHIN_EXPERT, is_linear
from .faults import Collector

SCALES = tuple({s for d in DIALECTS for s in (d.scale, d.alpha, *d.input_scale) if s} | {"_scale_inv"})
EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
KV = re.compile(r"(.+?)\.(k_proj\.k_scale|v_proj\.v_scale|k_scale|v_scale|kv_scale|kv_cache_scale)")
KV_OTHERS = ("k_bias", "v_bias", "q_scale", "prob_output_scale", "prob_scale", "output_scale")


def check_index(shards: Shards, found: Collector) -> None:
    if shards.index is None:
        return
    found.ran.add("index")
    where = shards.index.get("weight_map", {})
    for name, info in shards.tensors.items():
        if name not in where:
            lacking = "index-lacks-scales" if name.endswith(SCALES) else "index-names"
            found.add(lacking, name, f"in {info.file.name}, not in the index")
        elif where[name] != info.file.name:
            found.add("index-names", name, f"in {info.file.name}, the index says {where[name]}")
    for name in where:
        if name not in shards.tensors:
            found.add("index-names", name, f"the index says {where[name]}, no shard has it")
    metadata = shards.index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    real = sum(info.nbytes for info in shards.tensors.values())
    if said is not None and said != real:
        found.add("index-size", str(shards.path), f"total_size {said}, the shards hold {real} bytes")


def check_tensors(checkpoint: Checkpoint, found: Collector) -> None:
    """What the reader could not make a module of, and tensors around modules that should not be there."""
    found.ran |= {"tensors", "layout"}
    tensors, claims = checkpoint.shards.tensors, checkpoint.claims
    for error in checkpoint.errors:
        name, _, what = error.partition(": ")
        odd_scale = next(
            (name[: -len(d.packed)] + d.scale for d in DIALECTS if _other_type(name, d, tensors)), None
        )
        if odd_scale and "without block scales" in what:
            found.add(
                "wrong-layout", odd_scale, f"{tensors[odd_scale].dtype}, beside codes {tensors[name].dtype}"
            )
        else:
            found.add("missing-tensor" if re.search("missing|without", what) else "wrong-layout", name, what)
    for name in checkpoint.plain():
        base, _, suffix = name.rpartition(".")
        if base in checkpoint.modules and not KV.fullmatch(name) and suffix not in KV_OTHERS:
            found.add("extra-tensor", name, f"{tensors[name].dtype} {list(tensors[name].shape)}")
    for name, module in checkpoint.modules.items():
        entry = claims.excludes(name)
        # an NVFP4 export of DeepSeek-V4 leaves layers it excludes as they came, in MXFP4
        if entry and not (claims.method == "fp8" and module.kind != NVFP4):
            found.add("excluded-quantized", name, f"by {entry!r}")
    if claims.algo == "NVFP4_AWQ":
        for name, module in checkpoint.modules.items():
            if "pre_quant_scale" not in module.tensors:
                found.add("missing-tensor", name, "quant_algo NVFP4_AWQ needs pre_quant_scale")
    for module in _unquantized(checkpoint):
        found.add("not-quantized", module, f"{tensors[module + '.weight'].dtype}")


def _other_type(name: str, dialect, tensors) -> bool:
    return (
        bool(dialect.packed)
        and name.endswith(dialect.packed)
        and name[: -len(dialect.packed)] + dialect.scale in tensors
    )


def _unquantized(checkpoint: Checkpoint) -> Iterable[str]:
    """Linear layers in a float type, where the config says that everything it does not exclude is FP4."""
    claims = checkpoint.claims
    if claims.method not in ("modelopt", "compressed-tensors") or claims.layers or not checkpoint.modules:
        return
    if claims.algo and "NVFP4" not in claims.algo:
        return
    named = [target for group in claims.groups for target in targets(group)]
    every = not named or any(map(is_class, named))
    for name, info in checkpoint.shards.tensors.items():
        module, _, last = name.rpartition(".")
        linear = last == "weight" and info.dtype in FLOATS and len(info.shape) == 2
        if not linear or not is_linear(module) or claims.excludes(module):
            continue
        if every or claims.targets.first_match(module):
            yield module


def check_experts(checkpoint: Checkpoint, found: Collector) -> None:
    config = checkpoint.shards.config
    config = config | text_config(config)
    said = next((config[key] for key in EXPERT_COUNTS if isinstance(config.get(key), int)), None)
    blocks: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in checkpoint.shards.tensors:
        if match := EXPERT.fullmatch(name.rpartition(".")[0]):
            blocks[match[1]][int(match[2])][PART[match[3]]] = match[3]
    most = max((len(experts) for experts in blocks.values()), default=0)
    for prefix, experts in blocks.items():
        found.ran.add("experts")
        wanted = said if said is not None else most
        missing = sorted(set(range(wanted)) - set(experts))
        if missing or len(experts) != wanted:
            what = f"{len(experts)} of {wanted}" + (f", missing {_short(missing)}" if missing else "")
            found.add("expert-count", f"{prefix}.experts", what, abs(len(experts) - wanted))
        gates = sum("gate" in parts for parts in experts.values())
        needed = {"gate", "up", "down"} if 2 * gates >= len(experts) else {"up", "down"}
        for expert, parts in sorted(experts.items()):
            if lacks := sorted(needed - set(parts)):
                there = ", ".join(parts[p] for p in sorted(parts))
                found.add(
                    "expert-parts", f"{prefix}.experts.{expert}", f"no {', '.join(lacks)}; it has {there}"
                )
    for module in checkpoint.modules.values():
        if module.experts is not None:
            found.ran.add("experts")
            if said is not None and module.experts != said:
                found.add("expert-count", module.name, f"{module.experts} of {said}")


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def check_kv_scales(shards: Shards, found: Collector) -> None:
    families, layers = set(), defaultdict(set)
    for name in shards.tensors:
        match = KV.fullmatch(name)
        if not match or shards.tensors[name].dtype not in FLOATS:
            continue
        found.ran.add("kv-scales")
        suffix = match[2]
        families.add(re.sub("[kv]_", "", suffix) if "kv" not in suffix else suffix)
        layers[match[1]].add(suffix.rpartition(".")[2])
        for value in shards[name].float().flatten().tolist():
            if not math.isfinite(value) or value <= 0:
                found.add("kv-bad", name, f"{value:g}")
            elif value == 1.0 or not 1e-5 <= value <= 100:
                found.add("kv-odd", name, f"{value:g}")
    if len(families) > 1:
        found.add("kv-names", str(shards.path), "families: " + ", ".join(sorted(families)))
    for layer, kinds in layers.items():
        if len(kinds & {"k_scale", "v_scale"}) == 1:
            found.add("kv-names", layer, f"only {min(kinds)}")


def check_config(checkpoint: Checkpoint, found: Collector) -> None:
    if not checkpoint.modules:
        return
    found.ran.add("config")
    claims, path = checkpoint.claims, str(checkpoint.shards.path)
    config, legacy = checkpoint.shards.config, checkpoint.shards.quant_config
    said = quantization(config)
    # gpt-oss as OpenAI published it has none, and its readers need none
    original = all(module.dialect.packed == ".blocks" for module in checkpoint.modules.values())
    if not said and not original:
        found.add("config-legacy" if legacy else "config-missing", path)
    if claims.method in METHODS and checkpoint.format.name not in METHODS[claims.method]:
        found.add(
            "config-method", path, f"quant_method {claims.method}, the tensors are {checkpoint.format.name}"
        )
    for where in (said, (legacy or {}).get("quantization") or {}):
        algo = where.get("quant_algo")
        if isinstance(algo, str) and algo != algo.upper():
            found.add("config-case", path, f"quant_algo {algo!r}")
    groups = {module.group for module in checkpoint.modules.values()}
    if claims.group_size is not None and claims.group_size not in groups:
        found.add("config-group", path, f"config {claims.group_size}, tensors {min(groups)}")
    _ignored(checkpoint, found)


def _ignored(checkpoint: Checkpoint, found: Collector) -> None:
    """Every entry of the ignore list against the modules that exist, whole or as a parent of what exists."""
    names = set()
    for tensor in checkpoint.shards.tensors:
        expert = WITHIN_EXPERT.search(tensor)
        if expert and expert[1] != "0":
            continue  # one expert stands for all
        parts = tensor.split(".")
        names |= {".".join(parts[:n]) for n in range(1, len(parts))}
    entries, matched = checkpoint.claims.exclusions, set()
    for name in names:
        matched.update(entries.every_match(name))
    for entry in dict.fromkeys(checkpoint.claims.excluded):
        if entry in entries.refused:
            found.add("config-pattern", entry[:200], entries.refused[entry])
        elif entry not in matched:
            found.add("config-ignore", entry)

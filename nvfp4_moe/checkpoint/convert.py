"""MXFP4 checkpoint -> NVFP4 checkpoint.

Experts are converted one by one, each with its own alpha; what engines fuse into one product (gate and up,
w1 and w3, q k v) shares it, wherever its shards are. Nothing is believed: every result is compared with its
source, value by value, and the report says which half blocks changed and by how much.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..formats import BLOCK
from ..tensor import Mxfp4Tensor, Nvfp4Tensor
from .ahead import workers
from .dialects import MXFP4, Module
from .fidelity import compare, compare_scales
from .header import FLOATS, CheckpointError
from .layouts import LAYOUTS, Layout, Planned, config_files, kv_cache, matrices
from .names import fused_groups
from .reader import Checkpoint, open_checkpoint
from .rewrite import Job, Made, Plan, check_device, in_file_order, input_scale_for, left_behind

METHODS = ("best", "hybrid", "requantize", "verbatim_midpoint", "verbatim_search")


def plan_conversion(
    source, to: str | None = None, method: str = "best", activation_amax: float | None = None,
    device: str = "cpu",
) -> Plan:  # fmt: skip
    """source: a directory. to: modelopt | compressed-tensors; None: ModelOpt's, for DeepSeek-V4 as ModelOpt
    exports it. activation_amax: also write input_scale = amax / 2688, which engines that quantize
    activations with a static scale demand; without it the checkpoint says weights only."""
    checkpoint = open_checkpoint(source)
    if method not in METHODS:
        raise CheckpointError(f"method must be {' | '.join(METHODS)}, got {method}")
    layout = _layout(checkpoint, to)
    left = tuple(m for m in checkpoint.modules if layout.name == "deepseek-v4" and m.startswith("mtp."))
    modules = {name: m for name, m in checkpoint.modules.items() if name not in left}
    _refuse(checkpoint, modules, layout, renames=to is not None)
    check_device(device)
    scale = input_scale_for(activation_amax)
    jobs = [
        job for group in _groups(modules) for job in _jobs(checkpoint, group, layout, method, scale, device)
    ]
    made = [m for job in jobs for m in job.modules]
    owned = {t for m in modules.values() for t in m.tensors.values()}
    plain = matrices({n: i for n, i in checkpoint.shards.tensors.items() if n not in owned})
    configs = (checkpoint.shards.config, checkpoint.shards.quant_config)
    activations = scale is not None or all("input_scale" in m.tensors for m in modules.values())
    files = config_files(layout, *configs, made, plain, activations)
    options = {"to": layout.name, "method": method, "activation_amax": activation_amax}
    notes = (*checkpoint.warnings, *left_behind(checkpoint.shards))
    kv = kv_cache(*configs)
    if kv not in (None, "FP8") and layout.name == "compressed-tensors":
        notes += (f"the KV cache's {kv} is not carried over: compressed-tensors' config has no word for it",)
    if left:
        notes += (f"{len(left)} modules under mtp.* stay MXFP4, as engines expect them",)
    return Plan(checkpoint.shards, layout.name, in_file_order(checkpoint.shards, jobs), files, options, notes)


def _refuse(checkpoint: Checkpoint, modules: dict[str, Module], layout: Layout, renames: bool) -> None:
    path, name = checkpoint.shards.path, checkpoint.format.name
    if not modules or not (renames or any(m.kind == MXFP4 for m in modules.values())):
        raise CheckpointError(
            f"{path}: no MXFP4 weights, it is {name}: nothing to convert"
            + (", unless into the names `to` says" if modules else " (`nvfp4 quantize` takes BF16)")
        )
    plain = (name for name in checkpoint.plain() if name.endswith((".weight", ".weight_packed")))
    other = next((n for n in plain if checkpoint.shards.tensors[n].dtype not in FLOATS), None)
    if other and layout.name != "deepseek-v4":
        raise CheckpointError(
            f"{path}: {other} is {checkpoint.shards.tensors[other].dtype}: other quantized weights beside"
            " NVFP4 are in no config but DeepSeek-V4's"
        )


def _layout(checkpoint: Checkpoint, to: str | None) -> Layout:
    deepseek = checkpoint.format.name.startswith("deepseek-v4")
    if to is not None and to not in ("modelopt", "compressed-tensors"):
        raise CheckpointError(f"`to` must be modelopt | compressed-tensors, got {to}")
    if deepseek and to == "compressed-tensors":
        raise CheckpointError(
            f"{checkpoint.shards.path}: DeepSeek-V4 keeps FP8 layers under names that compressed-tensors does"
            " not use: convert to modelopt"
        )
    return LAYOUTS["deepseek-v4" if deepseek else to or "modelopt"]


def _groups(modules: dict[str, Module]) -> list[list[Module]]:
    """Modules that share an alpha. Stacked experts have gate and up in one already; NVFP4 keeps its own."""
    alone = {name for name, m in modules.items() if m.experts is not None or m.kind != MXFP4}
    names = fused_groups({name: m.shape for name, m in modules.items() if name not in alone})
    return [
        [modules[name] for name in group] for group in names + [[name] for name in modules if name in alone]
    ]


def surely_exact(source, progress: Callable[[int, int], None] = lambda now, total: None) -> tuple[int, int]:
    """(matrices that `best` converts without a change whatever their codes are, matrices in all), from the
    scales alone, a 17th of the bytes. The rest may be exact too: blocks of zeros have no say.

    progress(bytes just read, bytes in all)."""
    checkpoint, sure, total = open_checkpoint(source), 0, 0
    modules = {name: m for name, m in checkpoint.modules.items() if m.kind == MXFP4}
    nbytes = sum(checkpoint.shards.tensors[m.tensors["e8m0"]].nbytes for m in modules.values())
    groups = _groups(modules)
    with workers() as pool:
        for group, (exact, read) in zip(groups, pool.map(partial(_exact, checkpoint), groups), strict=True):
            sure += exact * len(group)
            total += (group[0].experts or 1) * len(group)
            progress(read, nbytes)
    return sure, total


def _exact(checkpoint: Checkpoint, group: list[Module]) -> tuple[int, int]:
    """(experts whose exponents span at most 17, bytes read)"""
    E = group[0].experts or 1
    scales = [checkpoint.shards[m.tensors["e8m0"]].view(torch.uint8).reshape(E, -1) for m in group]
    low = torch.stack([s.amin(1) for s in scales]).amin(0).int()
    high = torch.stack([s.amax(1) for s in scales]).amax(0).int()
    checkpoint.shards.release()
    return int(((high - low <= 17) & (high <= 252)).sum()), sum(s.numel() for s in scales)


# ---- jobs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Rows of a group's matrix that become a module of the target."""

    name: str
    module: Module
    rows: slice
    N: int


def _jobs(checkpoint: Checkpoint, group: list[Module], layout: Layout, method, scale, device) -> list[Job]:
    """One for a group of matrices; one an expert where experts are stacked."""
    reads = tuple(t for m in group for t in m.tensors.values())
    nbytes = sum(checkpoint.shards.tensors[t].nbytes for t in reads)
    experts = [None] if group[0].experts is None else range(group[0].experts)
    jobs = []
    for expert in experts:
        parts = _parts(checkpoint, group, expert)
        plan = tuple(entry for part in parts for entry in _planned(checkpoint, layout, part, scale))
        run = partial(_run, checkpoint, group, expert, parts, layout, method, scale, device)
        jobs.append(Job(reads, plan, run, nbytes // len(experts), tuple(p.name for p in parts)))
    return jobs


def _parts(checkpoint: Checkpoint, group: list[Module], expert: int | None) -> list[Part]:
    first, N = group[0], group[0].shape[0]
    if expert is None:
        ends = [sum(m.shape[0] for m in group[: i + 1]) for i in range(len(group))]
        return [
            Part(m.name, m, slice(end - m.shape[0], end), m.shape[0])
            for m, end in zip(group, ends, strict=True)
        ]
    base, _, last = first.name.rpartition(".")
    base = f"{base.removesuffix('.experts')}.experts.{expert}"
    if last in ("down_proj", "mlp2_weight"):
        return [Part(f"{base}.down_proj", first, slice(0, N), N)]
    if last not in ("gate_up_proj", "mlp1_weight"):
        raise CheckpointError(f"{first.name}: stacked experts must be gate_up_proj or down_proj")
    half = N // 2
    gate, up = slice(0, half), slice(half, N)
    if checkpoint.interleaves_gate_up(first.name):
        gate, up = slice(0, N, 2), slice(1, N, 2)
    return [Part(f"{base}.gate_proj", first, gate, half), Part(f"{base}.up_proj", first, up, half)]


def _planned(checkpoint: Checkpoint, layout: Layout, part: Part, scale: Tensor | None) -> list[Planned]:
    tensors = part.module.tensors
    if "pre_quant_scale" in tensors:
        raise CheckpointError(f"{tensors['pre_quant_scale']}: AWQ's scale of activations is not converted")
    has_input = scale is not None or "input_scale" in tensors
    plan = layout.planned(part.name, part.N, part.module.shape[1], has_input)
    if "bias" in tensors:
        plan.append((part.name + ".bias", checkpoint.shards.tensors[tensors["bias"]].dtype, (part.N,)))
    return plan


def _run(checkpoint, group, expert, parts: list[Part], layout: Layout, method, scale, device) -> Made:
    source = [checkpoint.rows_as_stored(m.name, experts=expert) for m in group]
    whole, result = source[0], source[0]
    if isinstance(whole, Mxfp4Tensor):
        if len(group) > 1:
            whole = Mxfp4Tensor(torch.cat([w.packed for w in source]), torch.cat([w.e8m0 for w in source]))
        try:
            result = whole.to(device).to_nvfp4(method).to("cpu")
        except ValueError as error:
            where = "" if expert is None else f", expert {expert}"
            raise CheckpointError(f"{' + '.join(m.name for m in group)}{where}: {error}") from None
    tensors, reports = {}, []
    for i, part in enumerate(parts):
        alpha = result.alpha[i] if result.alpha.dim() else result.alpha  # [2]: gate and up have their own
        after = Nvfp4Tensor(result.packed[part.rows], _rows(result.sf, part.rows), alpha)
        tensors |= layout.stored(part.name, after, _input_scale(checkpoint, part.module, expert, i, scale))
        tensors |= _own_scalars(checkpoint, part, layout)
        bias = checkpoint.bias(part.module.name)
        if bias is not None:
            tensors[part.name + ".bias"] = (bias if expert is None else bias[expert])[part.rows]
        if isinstance(whole, Mxfp4Tensor):
            report = compare(Mxfp4Tensor(whole.packed[part.rows], whole.e8m0[part.rows]), after)
        else:
            report = _renaming(checkpoint, part, expert, i, layout, tensors)
        reports.append({"module": part.name, **report})
    return Made(tensors, reports)


def _renaming(
    checkpoint: Checkpoint, part: Part, expert: int | None, i: int, layout: Layout, tensors
) -> dict:
    """A report line: what 1 / x did to the scalars."""
    module, dialect, scales = part.module, layout.dialect, {}
    for role, suffix in (("alpha", dialect.alpha), ("input_scale", dialect.input_scale[0])):
        if role not in module.tensors:
            continue
        old = checkpoint.shards[module.tensors[role]].double()
        old = old.reshape(module.experts or 1, -1) if old.numel() > 1 else old.reshape(1, 1)
        old = old[(expert or 0) % len(old), i % old.shape[1]]
        if not old:
            continue  # a matrix of zeros
        new = tensors[part.name + suffix].double().reshape(())
        scales[role] = (
            old.reciprocal() if module.dialect.inverse else old, new.reciprocal() if dialect.inverse else new
        )  # fmt: skip
    return compare_scales(part.N * module.shape[1] // BLOCK, scales)


def _own_scalars(checkpoint: Checkpoint, part: Part, layout: Layout) -> dict[str, Tensor]:
    """What stays NVFP4 keeps its scalars' bytes if the target stores them as the source does: 1 / (1 / x) is
    not x for a sixth of all float32."""
    module, target = part.module, layout.dialect
    if module.kind == MXFP4 or module.experts is not None or module.dialect.inverse != target.inverse:
        return {}
    suffix = {"alpha": target.alpha, "input_scale": target.input_scale[0]}
    roles = suffix.keys() & module.tensors.keys()
    stored = {role: checkpoint.shards[module.tensors[role]] for role in roles}
    return {part.name + suffix[role]: value.reshape(layout.scalar) for role, value in stored.items()}


def _rows(sf: Tensor, index) -> Tensor:
    return sf.view(torch.uint8)[index].view(torch.float8_e4m3fn)  # torch indexes bytes on every version


def _input_scale(checkpoint: Checkpoint, module: Module, expert: int | None, part: int, scale: Tensor | None):
    if "input_scale" not in module.tensors:
        return scale
    own = checkpoint.input_scale(module.name)
    own = own[expert] if own.dim() else own
    return own[part] if own.dim() else own  # [E, 2]: gate's and up's

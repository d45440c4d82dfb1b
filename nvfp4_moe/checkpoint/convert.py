"""MXFP4 checkpoint -> NVFP4 checkpoint.

Experts are converted one by one, each with its own alpha; what engines fuse into one product (gate and up, w1 and
w3, q k v) shares it, wherever its shards are. Nothing is believed: every result is compared with its source, value
by value, and the report says which half blocks changed and by how much.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..tensor import Mxfp4Tensor, Nvfp4Tensor
from .dialects import MXFP4, Module
from .fidelity import compare
from .header import CheckpointError
from .layouts import LAYOUTS, Layout, Planned, config_files, linear_names
from .reader import Checkpoint, open_checkpoint
from .rewrite import Job, Made, Result, in_file_order, planned_bytes, rewrite

METHODS = ("best", "hybrid", "requantize", "verbatim_midpoint", "verbatim_search")
FUSED = (  # last parts of names that engines multiply at once
    ("gate_proj", "up_proj"), ("w1", "w3"), ("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"),
)  # fmt: skip
FUSED_WITH = {name: names for names in FUSED for name in names}


@dataclass(frozen=True)
class Conversion:
    """What would be done: `nvfp4 convert --dry-run` prints it, run() does it."""

    checkpoint: Checkpoint
    layout: Layout
    jobs: list[Job]
    options: dict
    files: dict[str, bytes]
    left: tuple[str, ...] = ()  # MXFP4 modules that stay

    @property
    def source_bytes(self) -> int:
        return sum(info.nbytes for info in self.checkpoint.shards.tensors.values())

    @property
    def target_bytes(self) -> int:
        return planned_bytes(self.jobs)

    def run(self, target, progress: Callable[[int], None] = lambda nbytes: None, **limits) -> Result:
        shards = self.checkpoint.shards
        return rewrite(shards, self.jobs, target, self.files, self.options, progress=progress, **limits)


def plan_conversion(
    source, to: str | None = None, method: str = "best", activation_amax: float | None = None,
    device: str = "cpu",
) -> Conversion:  # fmt: skip
    """source: a directory. to: modelopt | compressed-tensors; None: ModelOpt's, and for DeepSeek-V4 ModelOpt's
    export of it. activation_amax: also write input_scale = amax / 2688, which engines that quantize activations
    with a static scale demand; without it the checkpoint says weights only."""
    checkpoint = open_checkpoint(source)
    if method not in METHODS:
        raise CheckpointError(f"method must be {' | '.join(METHODS)}, got {method}")
    layout = _layout(checkpoint, to)
    left = tuple(m for m in checkpoint.modules if layout.name == "deepseek-v4" and m.startswith("mtp."))
    modules = {name: m for name, m in checkpoint.modules.items() if name not in left}
    if not any(m.kind == MXFP4 for m in modules.values()):
        raise CheckpointError(
            f"{source}: no MXFP4 weights, it is {checkpoint.format.name}: nothing to convert"
            + (" (`nvfp4 quantize` takes BF16)" if not checkpoint.modules else "")
        )
    scale = None if activation_amax is None else torch.tensor(activation_amax / 2688)
    jobs = [
        job
        for group in fused_groups(modules)
        for job in _jobs(checkpoint, group, layout, method, scale, device)
    ]
    made = [m for job in jobs for m in job.modules]
    owned = {t for m in modules.values() for t in m.tensors.values()}
    plain = linear_names({n: i for n, i in checkpoint.shards.tensors.items() if n not in owned})
    configs = (checkpoint.shards.config, checkpoint.shards.quant_config)
    files = config_files(layout, *configs, made, plain, activation_amax is not None)
    options = {"to": layout.name, "method": method, "activation_amax": activation_amax}
    return Conversion(checkpoint, layout, in_file_order(checkpoint.shards, jobs), options, files, left)


def _layout(checkpoint: Checkpoint, to: str | None) -> Layout:
    deepseek = checkpoint.format.name.startswith("deepseek-v4")
    if to is not None and to not in ("modelopt", "compressed-tensors"):
        raise CheckpointError(f"`to` must be modelopt | compressed-tensors, got {to}")
    if deepseek and to == "compressed-tensors":
        raise CheckpointError(
            f"{checkpoint.shards.path}: DeepSeek-V4 keeps FP8 layers under names that compressed-tensors does not"
            " use: convert to modelopt"
        )
    return LAYOUTS["deepseek-v4" if deepseek else to or "modelopt"]


def fused_groups(modules: dict[str, Module]) -> list[list[Module]]:
    """Modules that share an alpha, in the order of FUSED; every module stands in one group."""
    groups: dict[tuple, list[Module]] = {}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        joined = FUSED_WITH.get(last) if module.experts is None and module.kind == MXFP4 else None
        key = (parent, joined, module.shape[1]) if joined else (name,)
        groups.setdefault(key, []).append(module)
    for key, group in groups.items():
        if len(key) == 3:
            group.sort(key=lambda m: key[1].index(m.name.rpartition(".")[2]))
    return list(groups.values())


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
    source = [_weight(checkpoint, m, expert) for m in group]
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
        before = after
        if isinstance(whole, Mxfp4Tensor):
            before = Mxfp4Tensor(whole.packed[part.rows], whole.e8m0[part.rows])
        tensors |= layout.stored(part.name, after, _input_scale(checkpoint, part.module, expert, scale))
        bias = checkpoint.bias(part.module.name)
        if bias is not None:
            tensors[part.name + ".bias"] = (bias if expert is None else bias[expert])[part.rows]
        reports.append({"module": part.name, **compare(before, after)})
    return Made(tensors, reports)


def _weight(checkpoint: Checkpoint, module: Module, expert: int | None) -> Mxfp4Tensor | Nvfp4Tensor:
    if expert is None:
        return checkpoint.weight(module.name)
    weight = checkpoint.weight(module.name, check=expert == 0)  # of all experts, once
    if isinstance(weight, Mxfp4Tensor):
        return Mxfp4Tensor(weight.packed[expert], weight.e8m0[expert])
    return Nvfp4Tensor(weight.packed[expert], _rows(weight.sf, expert), weight.alpha[expert])


def _rows(sf: Tensor, index) -> Tensor:
    return sf.view(torch.uint8)[index].view(torch.float8_e4m3fn)  # torch indexes bytes on every version


def _input_scale(checkpoint: Checkpoint, module: Module, expert: int | None, scale: Tensor | None):
    if "input_scale" not in module.tensors:
        return scale
    own = checkpoint.input_scale(module.name)
    return own[expert] if own.dim() else own

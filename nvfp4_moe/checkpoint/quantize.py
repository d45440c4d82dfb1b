"""BF16 checkpoint -> NVFP4 checkpoint: routed experts, or every linear, each with an alpha of its own; what
engines fuse into one product shares it.

Experts come one by one (`experts.3.up_proj.weight`) or stacked (`experts.gate_up_proj`, [E, K, 2I] in Llama 4
and gpt-oss, [E, 2I, K] elsewhere); they are written one by one, under the names the readers know.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..formats import BLOCK
from ..tensor import METHODS, Nvfp4Tensor
from .claims import is_gpt_oss, model_types, text_config
from .header import FLOATS, CheckpointError
from .layouts import LAYOUTS, Layout, config_files, matrices
from .names import STACKED, WITHIN_EXPERT, fused_groups, is_linear
from .patterns import matches, refusal_of
from .reader import Checkpoint, open_checkpoint
from .rewrite import Job, Made, Plan, check_device, in_file_order, input_scale_for, left_behind

COLUMNS = {"llama4", "llama4_text", "gpt_oss"}  # models that store stacked experts [E, K, N]


@dataclass(frozen=True)
class Weight:
    """One matrix to quantize: a tensor, or an expert's rows of a stacked one."""

    name: str  # of the module
    tensor: str
    shape: tuple[int, int]  # (N, K)
    expert: int | None = None
    columns: bool = False  # stored [K, N]
    rows: slice = field(default_factory=lambda: slice(None))
    bias: str | None = None

    def read(self, shards) -> Tensor:
        if self.expert is None:
            return shards[self.tensor]
        w = shards.rows(self.tensor, self.expert)
        return (w.T if self.columns else w)[self.rows]


def plan_quantization(
    source, to: str = "modelopt", method: str = "amax", layers: str = "experts",
    include: Iterable[str] = (), exclude: Iterable[str] = (), activation_amax: float | None = None,
    device: str = "cpu",
) -> Plan:  # fmt: skip
    """source: a directory. layers: experts | linears. include, exclude: names of modules, globs or
    re:patterns, added to and taken from these. activation_amax: as for convert."""
    if to not in ("modelopt", "compressed-tensors"):
        raise CheckpointError(f"`to` must be modelopt | compressed-tensors, got {to}")
    if method not in METHODS or layers not in ("experts", "linears"):
        raise CheckpointError(
            f"method must be {' | '.join(METHODS)} and layers experts | linears, got {method} and {layers}"
        )
    checkpoint, layout = open_checkpoint(source), LAYOUTS[to]
    shards = checkpoint.shards
    if checkpoint.modules:
        raise CheckpointError(f"{source}: is {checkpoint.format.name} already (`nvfp4 convert` takes MXFP4)")
    if checkpoint.claims.method:
        raise CheckpointError(
            f"{source}: quant_method is {checkpoint.claims.method}: only unquantized weights are read"
        )
    weights, notes = _choose(checkpoint, layers, tuple(include), tuple(exclude))
    by_name = {w.name: w for w in weights}
    check_device(device)
    scale = input_scale_for(activation_amax)
    jobs = [
        _job(checkpoint, [by_name[name] for name in group], layout, method, scale, device)
        for group in fused_groups({w.name: w.shape for w in weights})
    ]
    read = {w.tensor for w in weights}
    plain = matrices({name: info for name, info in shards.tensors.items() if name not in read})
    files = config_files(
        layout, shards.config, shards.quant_config, by_name, plain, activation_amax is not None
    )
    options = {"to": to, "method": method, "modules": sorted(by_name), "activation_amax": activation_amax}
    notes = (*checkpoint.warnings, *notes, *left_behind(shards))
    return Plan(shards, to, in_file_order(shards, jobs), files, options, notes)


def _choose(checkpoint: Checkpoint, layers: str, include, exclude) -> tuple[list[Weight], list[str]]:
    """The weights to quantize, and notes about those that cannot be."""
    chosen, notes, used = [], [], set()
    candidates = list(_candidates(checkpoint))
    for w in candidates:
        expert = w.expert is not None or WITHIN_EXPERT.search(w.name) is not None
        wanted = expert or (layers == "linears" and is_linear(w.name))
        added = [p for p in include if matches(p, w.name)]
        removed = [p for p in exclude if matches(p, w.name)]
        used.update(added + removed)
        if removed or not (wanted or added):
            continue
        if w.shape[1] % BLOCK:
            notes.append(f"{w.name}: K = {w.shape[1]} is no multiple of {BLOCK}: left as it is")
            continue
        chosen.append(w)
    for pattern in (*include, *exclude):
        if why := refusal_of(pattern):
            raise CheckpointError(f"pattern {pattern!r}: {why}")
        if pattern not in used:
            raise CheckpointError(f"{checkpoint.shards.path}: pattern {pattern!r} matches no weight")
    if not chosen:
        hint = "; `--layers linears` takes dense models too" if candidates else ""
        raise CheckpointError(f"{checkpoint.shards.path}: no weight to quantize{hint}")
    return chosen, notes


def _candidates(checkpoint: Checkpoint) -> Iterable[Weight]:
    tensors = checkpoint.shards.tensors
    for name, info in tensors.items():
        if info.dtype not in FLOATS:
            continue
        stacked = STACKED.fullmatch(name)
        if stacked and stacked[1] and len(info.shape) == 3:
            yield from _stacked(checkpoint, name, f"{stacked[1]}.experts", stacked[2])
        elif name.endswith(".weight") and len(info.shape) == 2:
            yield Weight(name.removesuffix(".weight"), name, info.shape)


def _stacked(checkpoint: Checkpoint, name: str, base: str, part: str) -> Iterable[Weight]:
    E, rows, cols = checkpoint.shards.tensors[name].shape
    columns = _stores_columns(checkpoint, base)
    N, K = (cols, rows) if columns else (rows, cols)
    bias = name + "_bias" if name + "_bias" in checkpoint.shards.tensors else None
    halves = {"down_proj": slice(0, N)}
    if part == "gate_up_proj":
        halves = {"gate_proj": slice(0, N // 2), "up_proj": slice(N // 2, N)}
        if is_gpt_oss(checkpoint.shards.config):
            halves = {"gate_proj": slice(0, N, 2), "up_proj": slice(1, N, 2)}
    for e in range(E):
        for proj, picked in halves.items():
            n = len(range(*picked.indices(N)))
            yield Weight(f"{base}.{e}.{proj}", name, (n, K), e, columns, picked, bias)


def _stores_columns(checkpoint: Checkpoint, base: str) -> bool:
    """Whether stacked experts are [E, K, N]: the model's type tells, or else the hidden size."""
    if COLUMNS & model_types(checkpoint.shards.config):
        return True
    config, info = checkpoint.shards.config, checkpoint.shards.tensors.get(f"{base}.gate_up_proj")
    hidden = config.get("hidden_size", text_config(config).get("hidden_size"))
    shape = info.shape if info else ()
    if hidden in shape[1:] and shape[1] != shape[2]:
        return shape[1] == hidden
    raise CheckpointError(
        f"{base}.gate_up_proj: [E, K, N] or [E, N, K]? Its shape is {list(shape)}, config.json's"
        f" hidden_size {hidden}"
    )


# ---- jobs -----------------------------------------------------------------------------------------------


def _job(checkpoint: Checkpoint, group: list[Weight], layout: Layout, method, scale, device) -> Job:
    shards, plan = checkpoint.shards, []
    for w in group:
        plan += layout.planned(w.name, *w.shape, scale is not None)
        if w.bias:
            plan.append((w.name + ".bias", shards.tensors[w.bias].dtype, (w.shape[0],)))
    reads = tuple(dict.fromkeys(t for w in group for t in (w.tensor, w.bias) if t))
    nbytes = sum(w.shape[0] * w.shape[1] * shards[w.tensor].element_size() for w in group)
    run = partial(_run, checkpoint, group, layout, method, scale, device)
    return Job(reads, tuple(plan), run, nbytes, tuple(w.name for w in group))


def _run(checkpoint: Checkpoint, group: list[Weight], layout: Layout, method, scale, device) -> Made:
    shards = checkpoint.shards
    parts = [w.read(shards).to(device) for w in group]
    for w, part in zip(group, parts, strict=True):
        if not part.isfinite().all():
            raise CheckpointError(f"{w.tensor}: holds NaN or Inf ({w.name})")
    whole = Nvfp4Tensor.quantize(torch.cat(parts) if len(parts) > 1 else parts[0].contiguous(), method)
    tensors, reports, at = {}, [], 0
    for w, part in zip(group, parts, strict=True):
        rows = slice(at, at + w.shape[0])
        sf = whole.sf.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        made = Nvfp4Tensor(whole.packed[rows], sf, whole.alpha)
        tensors |= layout.stored(w.name, made.to("cpu"), scale)
        if w.bias:
            tensors[w.name + ".bias"] = shards.rows(w.bias, w.expert)[w.rows]
        loss = (made.dequantize() - part.float()).norm() / part.float().norm().clamp(min=1e-30)
        reports.append({"module": w.name, "exact": bool(loss == 0), "relative_rms": float(loss)})
        at += w.shape[0]
    return Made(tensors, reports)

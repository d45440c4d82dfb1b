"""check_checkpoint: one pass over a checkpoint, every check, a report."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch

from ..checkpoint import Checkpoint, CheckpointError, Shards
from .faults import Collector
from .file_checks import check_config, check_experts, check_index, check_kv_scales, check_tensors
from .finding import Report
from .histograms import Distributions
from .mx_checks import check_mxfp4
from .pair_checks import check_activations, check_input_scales, check_pairs
from .scale_checks import check_nvfp4, check_scale_range
from .units import Unit, find_units, stream


def check_checkpoint(
    path,
    progress: Callable[[int, int], None] | None = None,
    activations: Mapping[str, float] | None = None,
) -> Report:
    """Read every scale and code under `path` once, a matrix at a time.

    progress(bytes done, bytes in all). activations: {module: the largest |x| of its input on real data}
    (ActivationProbe measures them), held against the checkpoint's input scales."""
    found = Collector()
    report = Report(str(path), "unreadable")
    try:
        shards = Shards(path)
    except (CheckpointError, OSError) as error:
        found.add("unreadable", str(path), str(error))
        return _finish(report, found)
    report.facts = {"tensors": len(shards), "files": len(shards.files)}
    report.facts["bytes"] = sum(info.nbytes for info in shards.tensors.values())
    check_index(shards, found)
    check_kv_scales(shards, found)
    try:
        checkpoint = Checkpoint(shards)
    except CheckpointError as error:
        found.add("refused", str(path), str(error).removeprefix(f"{path}: "))
        return _finish(report, found)
    report.format = checkpoint.format.name
    _headers(checkpoint, found)
    _contents(checkpoint, found, report, progress, activations or {})
    return _finish(report, found)


def _finish(report: Report, found: Collector) -> Report:
    report.findings, report.checks = found.findings(), found.verdicts()
    return report


def _headers(checkpoint: Checkpoint, found: Collector) -> None:
    if checkpoint.modules or checkpoint.errors:
        check_tensors(checkpoint, found)
        check_config(checkpoint, found)
    check_experts(checkpoint, found)


def _contents(checkpoint: Checkpoint, found: Collector, report: Report, progress, activations) -> None:
    units, seen = find_units(checkpoint, found), Distributions()
    for unit, table, packed, scales in stream(checkpoint, units, progress):
        if unit.nvfp4:
            losses = check_nvfp4(unit, table, packed, scales, found)
            seen.nvfp4(table, unit.alpha, losses)
        else:
            check_mxfp4(unit, table, packed, scales, found)
            seen.mxfp4(table, unit.exponents)
    check_scale_range(units, found)
    seen.ratios = check_pairs(units, found)
    check_input_scales(units, _dynamic(checkpoint), found)
    check_activations(units, activations, found)
    report.histograms = seen.histograms()
    report.facts |= {
        "modules": len(checkpoint.modules),
        "matrices": len(units),
        "moe_layers": len(list(checkpoint.moe_layers())),
        "compute": dict(Counter(module.compute for module in checkpoint.modules.values())),
        "quantizer": quantizer(units, seen.largest),
    }


def _dynamic(checkpoint: Checkpoint) -> bool:
    inputs = (group.get("input_activations") for group in checkpoint.claims.groups)
    return any(isinstance(i, dict) and i.get("dynamic") is True for i in inputs)


def quantizer(units: list[Unit], largest: torch.Tensor) -> str:
    """Which quantizer made the NVFP4 scales, as far as the codes tell. largest: blocks by their largest
    |code|."""
    nvfp4 = [unit for unit in units if unit.nvfp4 and not unit.dead]
    if not nvfp4:
        return "MXFP4" if units else "none"
    if all(unit.powers for unit in nvfp4):
        return "cast from MXFP4: every scale is a power of two"
    six, four = (float(largest[c] / largest[1:].sum().clamp(min=1)) for c in (7, 6))
    what = f"{six:.0%} of the blocks reach 6, {four:.0%} stop at 4"
    if six > 0.98:
        return f"amax: {what}"
    return f"searched scales (four-over-six, mse): {what}" if six + four > 0.98 else what

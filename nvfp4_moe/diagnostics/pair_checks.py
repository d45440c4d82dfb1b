"""Checks between matrices that engines fuse: gate and up, q, k and v; and over the experts of a layer."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import median

from ..checkpoint.names import QKV
from .faults import Collector
from .mx_checks import check_pair_spread
from .scale_checks import NORMAL
from .units import Unit

SAME = 1e-6  # relative: the float32 roundings of 1 / (1 / x)
FAR = 0.25
# amax / 2688 or amax / 448 of what exporters write for want of data: amax 6 and 0.5, and the plain 1
SENTINELS = {1 / 448: "6 / 2688", 0.5 / 2688: "0.5 / 2688", 1.0: "1"}
SPREAD = 1e4  # input scales too large by this still cost nothing; by 1e6 they cost half of the signal


def siblings(units: list[Unit]) -> dict[str, dict[str, Unit]]:
    """{parent module: {last part of the name: unit}} of the matrices that are stored one by one."""
    found = defaultdict(dict)
    for unit in units:
        if unit.expert is None:
            found[unit.parent][unit.last] = unit
    return found


def gate_up_pairs(units: list[Unit]) -> Iterator[tuple[Unit, Unit]]:
    for family in siblings(units).values():
        parts = {unit.part: unit for unit in family.values() if unit.part}
        if "gate" in parts and "up" in parts:
            yield parts["gate"], parts["up"]


def check_pairs(units: list[Unit], found: Collector) -> list[float]:
    """-> up's global scale over gate's, for every pair."""
    ratios = []
    for gate, up in gate_up_pairs(units):
        if gate.nvfp4 and up.nvfp4 and not (gate.dead or up.dead):
            ratios += _ratio(up.tensor("alpha"), gate.alpha[0], up.alpha[0], found)
        check_pair_spread(gate, up, found)
        _input_pair(gate, up, found)
    for unit in units:
        if len(unit.alpha) == 2 and not unit.dead:  # a stacked tensor with both halves' scales
            ratios += _ratio(unit.tensor("alpha"), *unit.alpha, found)
    for family in siblings(units).values():
        for names in QKV:
            there = [family[n] for n in names if n in family and family[n].nvfp4]
            _fused([unit for unit in there if _usable(unit.alpha[0])], found)
    return ratios


def _usable(alpha: float) -> bool:
    return math.isfinite(alpha) and alpha > 0


def _ratio(name: str, gate: float, up: float, found: Collector) -> list[float]:
    found.ran.add("gate-up")
    if not (_usable(gate) and _usable(up)):
        return []
    ratio = up / gate
    if abs(ratio - 1) > SAME:
        error = abs(1 / ratio - 1)
        fault = "gate-up-far" if max(ratio, 1 / ratio) > 1 + FAR else "gate-up-differ"
        detail = (
            f"gate {gate:.4g}, up {up:.4g}, ratio {ratio:.4g}: with gate's for both, up is {error:.1%} wrong"
        )
        found.add(fault, name, detail, abs(math.log(ratio)))
    return [ratio]


def _fused(units: list[Unit], found: Collector) -> None:
    if len(units) < 2:
        return
    found.ran.add("qkv")
    smallest = min(units, key=lambda unit: unit.alpha[0])
    ratio = max(unit.alpha[0] for unit in units) / smallest.alpha[0]
    if ratio - 1 > SAME:
        detail = ", ".join(f"{unit.last} {unit.alpha[0]:.4g}" for unit in units)
        detail = f"{detail}: under the largest, {ratio - 1:.1%} wrong"
        found.add("qkv-differ", smallest.tensor("alpha"), detail, ratio)


def _input_pair(gate: Unit, up: Unit, found: Collector) -> None:
    if gate.input_scale is None or up.input_scale is None:
        return
    found.ran.add("input-scale-pairs")
    if not abs(gate.input_scale - up.input_scale) <= SAME * abs(gate.input_scale):
        detail = f"gate {gate.input_scale:.4g}, up {up.input_scale:.4g}"
        found.add("input-scale-pair", up.tensor("input_scale"), detail)


def check_input_scales(units: list[Unit], dynamic: bool, found: Collector) -> None:
    """dynamic: the config says that activation scales are computed at run time, so none is missing."""
    layers = defaultdict(list)
    for unit in units:
        if not unit.nvfp4:
            continue
        block, experts, _ = unit.module.name.partition(".experts.")
        layers[f"{block}.experts.*.{unit.last}" if experts else unit.module.name].append(unit)
    for name, experts in layers.items():
        some = any(unit.input_scale is not None for unit in experts)
        for unit in experts:
            _input_scale(unit, some or (unit.module.compute == "nvfp4" and not dynamic), found)
        _over_experts(name, experts, found)


def _input_scale(unit: Unit, wanted: bool, found: Collector) -> None:
    scale = unit.input_scale
    if scale is None:
        if wanted and not unit.expert:  # a stacked tensor is one place
            found.add("input-scale-missing", unit.module.name)
        return
    found.ran.add("input-scale")
    name = unit.tensor("input_scale")
    sentinel = next((why for value, why in SENTINELS.items() if abs(scale - value) <= SAME * value), None)
    if not math.isfinite(scale) or scale < NORMAL:
        found.add("input-scale-bad", name, f"multiplier {scale:g}")
    elif sentinel:
        found.add("input-scale-sentinel", name, f"{scale:.7g} = {sentinel}")


def _over_experts(name: str, experts: list[Unit], found: Collector) -> None:
    scales = [
        unit.input_scale for unit in experts if unit.input_scale is not None and _usable(unit.input_scale)
    ]
    stacked = any(unit.expert is not None for unit in experts)
    if len(scales) < 2 or (stacked and len(set(scales)) == 1):
        return  # a stacked tensor may have one scale by design
    found.ran.add("input-scale-pairs")
    if len(set(scales)) == 1 and len(scales) == len(experts):
        found.add("input-scale-same", name, f"{scales[0]:.4g} for all {len(scales)}")
    spread = max(scales) / min(scales)
    if spread > SPREAD:
        low = min((u for u in experts if _usable(u.input_scale or 0)), key=lambda u: u.input_scale)
        detail = f"{min(scales):.3g}; median {median(scales):.3g}, largest {max(scales):.3g}"
        found.add("input-scale-spread", low.tensor("input_scale"), detail, spread)


def check_activations(units: list[Unit], activations: Mapping[str, float], found: Collector) -> None:
    """activations: {module: largest |x| of its input, measured on real data}."""
    for unit in units:
        measured = activations.get(unit.module.name)
        if measured is None or unit.input_scale is None or not _usable(unit.input_scale):
            continue
        found.ran.add("activations")
        factor = measured / (2688 * unit.input_scale)
        if factor > 1.5:
            fault = "activation-above" if factor <= 2 else "activation-far-above"
            detail = (
                f"measured {measured:.4g}, calibrated to {2688 * unit.input_scale:.4g}: {factor:.2f} times"
            )
            found.add(fault, unit.name, detail, factor)

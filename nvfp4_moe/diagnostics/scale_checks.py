"""Checks of one NVFP4 matrix by itself: its block scales, its global scale, its codes."""

import math
from collections import defaultdict

from torch import Tensor

from ..formats import E4M3_NAN
from .faults import Collector
from .statistics import (
    E4M3,
    FINITE,
    SATURATED,
    SIX,
    Folding,
    Table,
    first_block,
    folding,
    powers_of_two,
    sampled_std,
)
from .units import Unit

FEW = 8  # blocks: fewer than this say nothing about a tensor
NORMAL = 2.0**-126  # below it float32 is subnormal, and some devices flush it to zero
ALPHAS = (1e-10, 1.0)  # weights of a size from 1e-7 to 1e3
STDS = (1e-5, 10.0)  # of weights
CT_EIGHTH = 0x20  # 0.125, compressed-tensors' scale of a block that underflowed


def check_nvfp4(unit: Unit, table: Table, packed: Tensor, scales: Tensor, found: Collector) -> list[Folding]:
    """Every check of one matrix; keeps in `unit` what checks of several need. -> what folding each alpha
    costs."""
    found.ran |= {"nan-scales", "saturation", "underflow", "dead-experts", "codes"}
    found.ran |= {"global-scale", "inverted-scale", "folding"}
    finite = table.live[:FINITE].nonzero()
    unit.top = int(finite[-1]) if len(finite) else 0
    unit.powers = powers_of_two(table)
    _nan(unit, table, packed, scales, found)
    _saturation(unit, table, found)
    _underflow(unit, table, packed, scales, found)
    _dead(unit, table, found)
    _codes(unit, table, found)
    if unit.dead:
        return []
    good = [alpha for alpha in unit.alpha if _global_scale(unit, alpha, packed, scales, found)]
    losses = [folding(table, alpha) for alpha in good]
    for loss in losses:
        if loss.zeroed > 0.01 or loss.clamped > 0.01:
            detail = f"folded, {loss.zeroed:.1%} of the blocks become 0, {loss.clamped:.1%} exceed 448"
            found.add("folds-badly", unit.name, detail, loss.zeroed + loss.clamped)
    return losses


def _nan(unit: Unit, table: Table, packed: Tensor, scales: Tensor, found: Collector) -> None:
    nan, negative = int(table.scales[[E4M3_NAN, 0xFF]].sum()), int(table.scales[0x80:0xFF].sum())
    for fault, count, wanted in (
        ("nan-scale", nan, lambda s, _: s & 0x7F == E4M3_NAN),
        ("negative-scale", negative, lambda s, _: (s >= 0x80) & (s != 0xFF)),
    ):
        if count:
            at = first_block(packed, scales, wanted)
            found.add(fault, unit.tensor("sf"), f"{count} of {table.blocks}, the first at {at}", count)


def _saturation(unit: Unit, table: Table, found: Collector) -> None:
    """Blocks at 448 that use the largest code: a Gaussian matrix of 2048 x 2048 has about 2, and hundreds
    with an amax 1.25 too small. (Searched scales put more blocks at 448, whose largest code is then 4.)"""
    count = int(table.counts[SATURATED, SIX])
    if count > max(FEW, 1e-4 * table.blocks):
        detail = f"{count} of {table.blocks} blocks ({count / table.blocks:.2%})"
        found.add("saturated", unit.tensor("sf"), detail, count / table.blocks)


def _underflow(unit: Unit, table: Table, packed: Tensor, scales: Tensor, found: Collector) -> None:
    lost = int(table.live[0])
    if lost:
        at = first_block(packed, scales, lambda s, largest: (s == 0) & (largest > 0))
        found.add("lost-blocks", unit.tensor("sf"), f"{lost} of {table.blocks}, the first at {at}", lost)
    # a block that fits has codes up to 6, or 2 and more if its exponent came from MXFP4; 1 and less was
    # pushed there
    pinned = int(table.counts[0x01, 1:3].sum())
    if pinned > max(FEW, 1e-3 * table.blocks):
        detail = f"{pinned} of {table.blocks} blocks hold nothing above 2^-9"
        found.add("pinned-blocks", unit.tensor("sf"), detail, pinned / table.blocks)
    eighths, small = int(table.counts[CT_EIGHTH, 0]), int(table.live[1:0x03].sum())
    if unit.module.dialect.inverse and eighths and small:  # scales of 2^-8 beside them
        found.add(
            "ct-eighth", unit.tensor("sf"), f"{eighths} blocks, {small} beside them at 2^-8 or less", eighths
        )


def _dead(unit: Unit, table: Table, found: Collector) -> None:
    if unit.dead:
        scales = f"global scale {unit.alpha[0]:.3g}" if unit.alpha else "MXFP4"
        found.add("dead-weight", unit.tensor("packed"), scales)
    elif unit.top in (0x38, CT_EIGHTH) and int(table.scales[unit.top]) == table.blocks > FEW:
        found.add("one-scale", unit.tensor("sf"), f"{E4M3[unit.top]:g} for all {table.blocks} blocks")


def _codes(unit: Unit, table: Table, found: Collector) -> None:
    """A block whose largest value is 3 or less is the same, finer, under half the scale: quantizers never
    choose it."""
    above_floor = table.counts[0x20:SATURATED, 1:]
    unused, blocks = int(above_floor[:, :5].sum()), int(above_floor.sum())
    if not unit.powers and unused > max(FEW, 0.01 * blocks):
        found.add("codes-unused", unit.tensor("packed"), f"{unused} of {blocks} blocks", unused / blocks)


def _global_scale(unit: Unit, alpha: float, packed: Tensor, scales: Tensor, found: Collector) -> bool:
    """Whether alpha is a number to compute with."""
    name = unit.tensor("alpha")
    if not math.isfinite(alpha) or alpha < NORMAL:
        found.add("bad-global", name, f"multiplier {alpha:g}")
        return False
    if ALPHAS[0] <= alpha <= ALPHAS[1]:
        return True
    std = sampled_std(packed, scales)
    low, high = STDS
    if alpha > 1 and not low <= std * alpha <= high and low <= std / alpha <= high:
        detail = f"multiplier {alpha:.4g} gives weights of size {std * alpha:.3g}, 1 / it {std / alpha:.3g}"
        found.add("inverted-global", name, detail, alpha)
    else:
        found.add(
            "odd-global", name, f"multiplier {alpha:.4g} gives weights of size {std * alpha:.3g}", alpha
        )
    return True


def check_scale_range(units: list[Unit], found: Collector) -> None:
    """The largest block scale, over all matrices that share a global scale: fused pairs, all experts of a
    layer."""
    sharing = defaultdict(list)
    for unit in units:
        if unit.nvfp4 and not unit.dead and unit.top:
            block = (
                unit.module.name.partition(".experts.")[0] if ".experts." in unit.module.name else unit.parent
            )
            sharing[block, tuple(unit.alpha)].append(unit)
    for group in sharing.values():
        found.ran.add("scale-range")
        best = max(group, key=lambda unit: unit.top)
        top, name = float(E4M3[best.top]), best.tensor("sf")
        more = f" ({len(group)} tensors share this global scale)" if len(group) > 1 else ""
        if top <= 2.0**-4:
            found.add("tiny-scales", name, f"the largest is {top:g}{more}", -top)
        elif top < 200 and not all(unit.powers for unit in group):
            found.add("low-scales", name, f"the largest is {top:g}{more}", -top)

"""Checks of MXFP4 exponents, and what they would become in NVFP4."""

from torch import Tensor

from .faults import Collector
from .statistics import Table, first_block, out_of_range
from .units import Unit

MAX_SPREAD = 17  # powers of two that E4M3 holds below the top one: 2^-9 .. 2^8
NAN = 0xFF
HIGHEST = 252  # 2^125: 6 times more overflows float32


def check_mxfp4(unit: Unit, table: Table, packed: Tensor, scales: Tensor, found: Collector) -> None:
    found.ran |= {"e8m0", "dead-experts"}
    name = unit.tensor("e8m0")
    zero = table.counts[:, 0]
    for fault, counts, wanted in (
        ("e8m0-nan", table.live[HIGHEST + 1 :], lambda e, c: (e > HIGHEST) & (c > 0)),
        ("e8m0-nan-zero", zero[NAN:], lambda e, c: (e == NAN) & (c == 0)),
        ("e8m0-zero-byte", table.live[:1], lambda e, c: (e == 0) & (c > 0)),
    ):
        if count := int(counts.sum()):
            at = first_block(packed, scales, wanted)
            found.add(fault, name, f"{count} of {table.blocks} blocks, the first at {at}", count)
    if unit.dead:
        found.add("dead-weight", unit.tensor("packed"))
    if unit.exponents is None:
        return
    high = unit.exponents.high + 127
    if stray := int(zero[high + 1 : NAN].sum()):
        top = high + 1 + int(zero[high + 1 : NAN].nonzero()[-1])
        found.add(
            "e8m0-stray", name, f"{stray} blocks, up to 2^{top - 127}; others reach 2^{high - 127}", stray
        )
    if unit.exponents.spread > MAX_SPREAD:
        count, error = out_of_range(table, unit.exponents.high)
        detail = f"span {unit.exponents.spread}: {count} of {table.blocks} blocks lose about {error:.0%}"
        found.add("e8m0-spread", name, detail, unit.exponents.spread)


def check_pair_spread(gate: Unit, up: Unit, found: Collector) -> None:
    if gate.exponents is None or up.exponents is None:
        return
    both = gate.exponents.union(up.exponents)
    if max(gate.exponents.spread, up.exponents.spread) <= MAX_SPREAD < both.spread:
        detail = f"span {both.spread}: gate reaches 2^{gate.exponents.high}, up 2^{up.exponents.high}"
        found.add("e8m0-pair-spread", up.tensor("e8m0"), detail, both.spread)

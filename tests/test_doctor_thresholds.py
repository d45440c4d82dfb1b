"""Where a number turns into a finding, on both sides of the border."""

import pytest
import torch

from nvfp4_moe.checkpoint import Module
from nvfp4_moe.checkpoint.dialects import DIALECTS
from nvfp4_moe.diagnostics import mx_checks, pair_checks, scale_checks
from nvfp4_moe.diagnostics.faults import Collector
from nvfp4_moe.diagnostics.file_checks import check_kv_scales
from nvfp4_moe.diagnostics.statistics import Exponents, Table
from nvfp4_moe.diagnostics.units import Unit

MODELOPT = next(d for d in DIALECTS if d.name == "modelopt-nvfp4" and d.layout == "rows")
NO_CODES = torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)


def unit(name="m.down_proj", kind="nvfp4", alpha=1e-4, expert=None, **fields):
    roles = ("packed", "sf", "e8m0", "alpha", "input_scale")
    module = Module(name, kind, "nvfp4", None, (1, 16), 16, {r: f"{name}.{r}" for r in roles}, MODELOPT)
    made = Unit(module, expert, [alpha] if kind == "nvfp4" else [], fields.pop("input_scale", None))
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def table(counts: dict) -> Table:
    """{(scale byte, largest code): blocks}"""
    full = torch.zeros(256, 8, dtype=torch.int64)
    for at, count in counts.items():
        full[at] = count
    return Table(full, torch.zeros(16, dtype=torch.int64))


def faults(check, *operands) -> set[str]:
    found = Collector()
    check(*operands, found)
    return {finding.fault for finding in found.findings()}


ORDINARY = 0x70  # a scale of 128


@pytest.mark.parametrize(
    "blocks, at_448, says",
    [(1000, 8, False), (1000, 9, True), (200_000, 20, False), (200_000, 21, True)],
)
def test_saturation_begins_beyond_8_blocks_and_one_in_10000(blocks, at_448, says):
    counts = {(ORDINARY, 7): blocks - at_448, (0x7E, 7): at_448}
    assert faults(scale_checks._saturation, unit(), table(counts)) == ({"saturated"} if says else set())
    counts = {(ORDINARY, 7): blocks - at_448, (0x7E, 6): at_448}  # a searched scale, whose block ends at 4
    assert faults(scale_checks._saturation, unit(), table(counts)) == set()


@pytest.mark.parametrize(
    "blocks, pinned, largest, says",
    [
        (1000, 8, 1, False), (1000, 9, 1, True), (1000, 9, 2, True), (1000, 500, 3, False),
        (100_000, 100, 2, False), (100_000, 101, 2, True), (1000, 500, 0, False),
    ],
)  # fmt: skip
def test_pinned_blocks_hold_nothing_above_1(blocks, pinned, largest, says):
    counts = {(ORDINARY, 7): blocks - pinned, (0x01, largest): pinned}
    got = faults(scale_checks._underflow, unit(), table(counts), *NO_CODES)
    assert got == ({"pinned-blocks"} if says else set())


@pytest.mark.parametrize("zeroed, says", [(2, False), (3, True)])
def test_folding_is_worth_a_line_beyond_one_block_in_100(zeroed, says):
    # under alpha 2^-8 the scale 2^-3 becomes 2^-11, which E4M3 rounds to 0, and 2 becomes 2^-7
    counts = {(0x40, 7): 200 - zeroed, (0x20, 7): zeroed}
    packed, scales = torch.full((1, 8), 0x77, dtype=torch.uint8), torch.full((1, 1), 0x40, dtype=torch.uint8)
    got = faults(scale_checks.check_nvfp4, unit(alpha=2.0**-8), table(counts), packed, scales)
    assert got == ({"folds-badly"} if says else set())
    counts = {(0x40, 7): 200 - zeroed, (0x7D, 7): zeroed}  # 416 * 0.9 * 1.2
    got = faults(scale_checks.check_nvfp4, unit(alpha=1.1), table(counts), packed, scales)
    assert ("folds-badly" in got) == says


@pytest.mark.parametrize(
    "alpha, packed, want",
    [
        (1e-10, 0x77, set()),
        (0.99e-10, 0x77, {"odd-global"}),
        (1.0, 0x77, set()),
        (1.5, 0x77, {"odd-global"}),  # 64 * 6 / 1.5 would be no weight's size either
        (1e4, 0x17, {"inverted-global"}),
        (2.0**-126, 0x77, {"odd-global"}),
        (2.0**-127, 0x77, {"bad-global"}),
        (0.0, 0x77, {"bad-global"}),
        (float("nan"), 0x77, {"bad-global"}),
        (float("-inf"), 0x77, {"bad-global"}),
    ],
)
def test_global_scales(alpha, packed, want):
    codes = torch.full((1, 8), packed, dtype=torch.uint8)
    codes[0, ::2] ^= 0x88  # both signs, so that there is a deviation
    scales = torch.full((1, 1), 0x68, dtype=torch.uint8)  # 64
    assert faults(scale_checks._global_scale, unit(), alpha, codes, scales) == want


@pytest.mark.parametrize(
    "tops, powers, want",
    [
        ([0x7E], False, set()),
        ([0x75], False, set()),  # 208
        ([0x74], False, {"low-scales"}),  # 192
        ([0x74], True, set()),  # cast from MXFP4
        ([0x74, 0x7E], False, set()),  # one of a pair reaches 448
        ([0x19], False, {"low-scales"}),  # 0.0703
        ([0x18], False, {"tiny-scales"}),  # 2^-4
    ],
)
def test_the_largest_scale_counts_over_all_that_share_a_global_scale(tops, powers, want):
    units = [unit(f"m.{'xy'[i]}_proj", top=top, powers=powers) for i, top in enumerate(tops)]
    assert faults(scale_checks.check_scale_range, units) == want
    apart = [unit(f"m.{i}.x_proj", top=u.top, powers=powers) for i, u in enumerate(units)]
    alone = {"low-scales"} if tops == [0x74, 0x7E] else want  # the first has nobody who reaches 448
    assert faults(scale_checks.check_scale_range, apart) == alone
    dead = [unit("m.x_proj", top=0x10, dead=True), unit("m.y_proj", kind="mxfp4", top=0x10)]
    assert faults(scale_checks.check_scale_range, dead) == set()


@pytest.mark.parametrize(
    "ratio, want",
    [
        (1.0, set()),
        (1 + 5e-7, set()),
        (1 + 2e-6, {"gate-up-differ"}),
        (1.24, {"gate-up-differ"}),
        (1 / 1.24, {"gate-up-differ"}),
        (1.26, {"gate-up-far"}),
        (1 / 1.26, {"gate-up-far"}),
        (float("nan"), set()),  # bad-global's matter
    ],
)
def test_gate_and_up(ratio, want):
    pair = [unit("m.gate_proj"), unit("m.up_proj", alpha=1e-4 * ratio)]
    assert faults(pair_checks.check_pairs, pair) == want
    pair[0].dead = True  # a dead half has no scale to compare
    assert faults(pair_checks.check_pairs, pair) == set()
    stacked = unit("m.experts.gate_up_proj", expert=0)
    stacked.alpha = [1e-4, 1e-4 * ratio]
    assert faults(pair_checks.check_pairs, [stacked]) == want
    stacked.dead = True
    assert faults(pair_checks.check_pairs, [stacked]) == set()


@pytest.mark.parametrize("ratio, want", [(1 + 5e-7, set()), (1.001, {"qkv-differ"}), (0.5, {"qkv-differ"})])
def test_fused_projections(ratio, want):
    units = [unit("m.q_proj"), unit("m.k_proj"), unit("m.v_proj", alpha=1e-4 * ratio)]
    assert faults(pair_checks.check_pairs, units) == want
    assert faults(pair_checks.check_pairs, [units[0], unit("other.v_proj", alpha=5e-4)]) == set()


@pytest.mark.parametrize(
    "scale, want",
    [
        (1e-3, set()),
        (2.0**-126, set()),
        (2.0**-127, {"input-scale-bad"}),
        (-1e-3, {"input-scale-bad"}),
        (float("inf"), {"input-scale-bad"}),
        (float("nan"), {"input-scale-bad"}),
        (1.0, {"input-scale-sentinel"}),
        (0.00223214296, {"input-scale-sentinel"}),
        (0.002233, set()),
        (0.5 / 2688 * (1 + 1e-7), {"input-scale-sentinel"}),
        (1.861e-4, set()),
        (None, {"input-scale-missing"}),
    ],
)
def test_input_scales(scale, want):
    assert faults(pair_checks.check_input_scales, [unit(input_scale=scale)], False) == want


def test_a_stacked_tensors_missing_scale_is_one_place():
    found = Collector()
    pair_checks.check_input_scales([unit("m.experts.down_proj", expert=e) for e in range(4)], False, found)
    assert [p.name for f in found.findings() for p in f.places] == ["m.experts.down_proj"]


def test_a_dynamic_scale_is_not_missing_unless_other_experts_have_one():
    alone, other = (unit(f"m.experts.{e}.up_proj", input_scale=s) for e, s in enumerate((None, 1e-3)))
    assert faults(pair_checks.check_input_scales, [alone], True) == set()
    assert faults(pair_checks.check_input_scales, [alone, other], True) == {"input-scale-missing"}


@pytest.mark.parametrize("spread, says", [(0.99e4, False), (1.01e4, True)])
def test_input_scales_over_experts(spread, says):
    units = [unit(f"m.experts.{e}.up_proj", input_scale=s) for e, s in enumerate((1e-6, 3e-6, 1e-6 * spread))]
    got = faults(pair_checks.check_input_scales, units, False)
    assert got == ({"input-scale-spread"} if says else set())
    units[0].input_scale = -1.0  # bad, and not the smallest
    assert "input-scale-spread" not in faults(pair_checks.check_input_scales, units, False)


@pytest.mark.parametrize(
    "factor, want",
    [
        (1.49, set()), (1.51, {"activation-above"}), (1.99, {"activation-above"}),
        (2.01, {"activation-far-above"}), (1e-4, set()),
    ],
)  # fmt: skip
def test_activations(factor, want):
    measured = {"m.down_proj": 2688 * 1e-3 * factor}
    assert faults(pair_checks.check_activations, [unit(input_scale=1e-3)], measured) == want
    assert faults(pair_checks.check_activations, [unit(input_scale=None)], measured) == set()


@pytest.mark.parametrize("spread, want", [(17, set()), (18, {"e8m0-spread"})])
def test_the_spread_of_exponents(spread, want):
    made = unit(kind="mxfp4", exponents=Exponents(-20, -20 + spread))
    counts = table({(107, 7): 5, (107 + spread, 7): 5})
    assert faults(mx_checks.check_mxfp4, made, counts, *NO_CODES) == want


@pytest.mark.parametrize("shift, want", [(10, set()), (11, {"e8m0-pair-spread"})])
def test_the_spread_of_a_pair(shift, want):
    gate = unit("m.w1", kind="mxfp4", exponents=Exponents(-20, -13))
    up = unit("m.w3", kind="mxfp4", exponents=Exponents(-20 + shift, -13 + shift))
    assert faults(mx_checks.check_pair_spread, gate, up) == want
    wide = unit("m.w3", kind="mxfp4", exponents=Exponents(-20, -2))  # has a finding of its own
    assert faults(mx_checks.check_pair_spread, gate, wide) == set()


@pytest.mark.parametrize(
    "counts, want",
    [
        ({(100, 7): 5, (101, 0): 1}, {"e8m0-stray"}),
        ({(100, 7): 5, (100, 0): 1}, set()),
        ({(100, 7): 5, (99, 0): 1, (0, 0): 3}, set()),  # compressed-tensors' byte of a block of zeros
        ({(100, 7): 5, (254, 0): 1}, {"e8m0-stray"}),
        ({(100, 7): 5, (255, 0): 1}, {"e8m0-nan-zero"}),
    ],
)
def test_stray_exponents_lie_above_the_live_ones(counts, want):
    made = unit(kind="mxfp4", exponents=Exponents(-27, -27))
    assert faults(mx_checks.check_mxfp4, made, table(counts), *NO_CODES) == want


@pytest.mark.parametrize(
    "byte, want", [(252, set()), (253, {"e8m0-nan"}), (0, {"e8m0-zero-byte"}), (1, set())]
)
def test_exponents_that_float32_cannot_hold(byte, want):
    made = unit(kind="mxfp4")
    assert faults(mx_checks.check_mxfp4, made, table({(byte, 7): 5}), *NO_CODES) == want


class OneScale(dict):
    """Shards with KV scales only."""

    def __init__(self, **values):
        super().__init__({f"l.{name}": torch.tensor(value) for name, value in values.items()})
        self.path = "here"
        self.tensors = {name: type("Info", (), {"dtype": "F32"}) for name in self}


@pytest.mark.parametrize(
    "value, want",
    [
        (0.03, set()), (100.0, set()), (100.1, {"kv-odd"}), (1.1e-5, set()), (0.9e-5, {"kv-odd"}),
        (1.0, {"kv-odd"}), (0.0, {"kv-bad"}), (float("inf"), {"kv-bad"}),
    ],
)  # fmt: skip
def test_kv_scales(value, want):
    assert faults(check_kv_scales, OneScale(k_scale=value, v_scale=0.02)) == want

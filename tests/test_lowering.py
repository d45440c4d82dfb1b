"""tests/blackwell_on_hopper/lower.py: PTX in, PTX that Hopper takes out. Needs no GPU."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "blackwell_on_hopper"))
import lower

EXTENTS = "".join(
    f"tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%rd9], {i}, {r};\n"
    for map_ in (["%r1", "%r2", "%r9", "%r9", "%r9"], ["%r3", "%r4", "%r5", "%r6", "%r9"],
                 ["%r1", "%r7", "%r9", "%r9", "%r9"], ["%r3", "%r4", "%r5", "%r6", "%r9"],
                 ["%r11", "%r12", "%r13", "%r13", "%r13"])
    for i, r in enumerate(map_)
)  # fmt: skip
COPY = (
    "cp.async.bulk.tensor.{d}d{pair}.shared::cluster.global.mbarrier::complete_tx::bytes{cast}"
    ".L2::cache_hint "
    "[%r20], [%rd20, {{%r21, %r22{more}}}], [%r23], {mask}%rd21;"
)
FLAT = COPY.format(d=2, pair="", cast="", more="", mask="")
DEEP = COPY.format(d=4, pair="", cast="", more=", %r24, %r24", mask="")
ONE = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [%r1], %rd1, %rd2, %r2, [%r3], [%r4], p;"


def lowered(text: str) -> str:
    return lower.lower(EXTENTS + text)[0].removeprefix(lower.lower(EXTENTS)[0])


def test_the_extent_of_k_is_halved_on_the_two_maps_of_codes_only():
    text = lower.lower(EXTENTS)[0]
    assert text.count("shr.u32 h, %r1, 1;") == 2 and text.count("shr.u32") == 2
    assert text.count("tensormap.replace") == 25


def test_maps_set_in_another_way_are_refused():
    with pytest.raises(AssertionError, match="two FP4 operands"):
        lower.lower(EXTENTS.replace("0, %r1;", "0, %r8;", 1))


@pytest.mark.parametrize(
    "instruction, function",
    [
        (ONE, "emulate_mma"),
        ("tcgen05.cp.cta_group::1.32x128b.warpx4 [%r1], %rd2;", "emulate_cp"),
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], %r2;", "emulate_alloc"),
        ("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];", "emulate_commit"),
        (
            "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 "
            "[%r1], %rs2;",
            "emulate_commit",
        ),
        ("tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r1, %r2}, [%r3];", "emulate_ld"),
    ],
)
def test_an_instruction_becomes_a_call(instruction, function):
    text = lowered(instruction)
    assert f"{function}, (" in text and "tcgen05" not in text


def test_registers_of_16x256b_are_neighbours_in_two_rows():
    registers = ", ".join(f"%r{i}" for i in range(1, 9))
    text = lowered(f"tcgen05.ld.sync.aligned.16x256b.x2.b32{{{registers}}},[%r9];")
    offsets = [line.split("[a+")[1].rstrip("];") for line in text.splitlines() if "ld.global" in line]
    assert list(map(int, offsets)) == [0, 4, 16384, 16388, 32, 36, 16416, 16420]


def test_copies_of_codes_count_bytes_and_copies_of_scales_stay():
    assert "shr.u32 h, %r21, 1;" in lowered(FLAT) and "{h, %r22}" in lowered(FLAT)
    assert lowered(DEEP) == DEEP


def test_a_pairs_copies_count_at_the_leaders_barrier():
    pair = {"pair": ".cta_group::2"}
    text = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], %r40;\nmov.b32 \t%r40, 77824;\n"
    cast = {"cast": ".multicast::cluster", "mask": "%rs1, ", **pair}
    text += COPY.format(d=2, cast="", more="", mask="", **pair) * 2
    text += COPY.format(d=4, more=", %r24, %r24", **cast)
    text += COPY.format(d=2, cast="", more="", mask="", **pair) + COPY.format(d=2, more="", **cast)
    text = lowered(text)
    sizes = [
        line.split("], ")[1].rstrip(";")
        for line in text.splitlines()
        if line.startswith("st.param.b32 [p0], ") and "%r" not in line
    ]
    # 128 rows of weights; half of 256 tokens; the scales of all; weights; those tokens again, slice by slice
    assert sizes == ["16384", "16384", "4096", "16384", "16384"]
    assert "cta_group" not in text and "multicast::cluster" not in text
    assert text.count("emulate_copy_end") == 5 and text.count("cvt.u32.u16 mask, %rs1;") == 2


def test_what_is_not_known_is_left_for_ptxas_to_refuse():
    unknown = ONE.replace("block16", "block32")
    assert lowered(unknown) == unknown

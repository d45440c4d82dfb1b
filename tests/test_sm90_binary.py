"""What the compiler made of Hopper's tiles, read off the library that was built; needs no GPU."""

import re
from pathlib import Path

import pytest
from machine_code import kernels, tools

import nvfp4_moe

LIBRARY = Path(nvfp4_moe._library).with_name("libnvfp4_sm90.so")
pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason=f"{LIBRARY.name} is not built"),
    pytest.mark.skipif(tools() is None, reason="no cuobjdump and nvdisasm"),
]


def tiles(of: str = "grouped_kernel|pair_kernel") -> dict[str, str]:
    found = {name: sass for (_, name), sass in kernels(LIBRARY).items() if re.search(of, name)}
    assert found, f"no {of}"
    return found


def test_no_kernel_stores_to_local_memory():
    """STL is what a spill looks like; what a function reserves says test_machine_code.py."""
    assert not [name for name, sass in tiles("").items() if " STL" in sass]


def test_every_tile_multiplies_on_the_tensor_cores_and_loads_by_the_copy_engine():
    for name, sass in tiles().items():
        counts = {what: len(re.findall(rf"\b{what}", sass)) for what in ("HG?MMA", "UTMALDG", "UBLKCP")}
        assert all(counts.values()), f"{name}: {counts}"


def test_weights_come_from_registers_and_no_product_is_rounded_by_fewer_bits():
    """Float32 accumulators, BF16 in; HGMMA's first operand in a register, as both of HMMA's are."""
    right = r"HGMMA\.64x\d+x16\.F32\.BF16 R\d+, R\d+,|HMMA\.16816\.F32\.BF16 "
    for name, sass in tiles().items():
        products = re.findall(r"HG?MMA\S*\s[^;]*", sass)
        other = [p for p in products if not re.match(right, p)]
        assert not other, f"{name}: {other[:3]}"


def test_a_stage_is_free_when_its_loads_are_done():
    """By a fence between a warp's last load and its arrival: without it the copy engine overwrites what is
    still read, which nothing shows but memcheck's delays (docs/kernels.md, Hopper)."""
    narrow = {name: sass for name, sass in tiles().items() if "LDSM" in sass}
    assert len(narrow) == 8  # two tiles of eight tokens, in two layouts, of one product and of two
    for name, sass in narrow.items():
        marks = re.findall(r"\bLDSM?\b|FENCE\.VIEW\.ASYNC\.S|SYNCS\.ARRIVE", sass)
        first, last = marks.index("LDSM"), len(marks) - 1 - marks[::-1].index("LDSM")
        assert {*marks[first:last]} <= {"LDS", "LDSM"}, f"{name}: arrivals between a stage's loads"
        assert marks[last + 1 : last + 3] == ["FENCE.VIEW.ASYNC.S", "SYNCS.ARRIVE"], name


def unread(code: list[str]) -> set[int]:
    """Registers that were loaded from shared memory, and not read up to the end of the code."""
    waiting = set()
    for line in code:
        operation, _, operands = re.sub(r"^@!?U?P\d+ ", "", line).partition(" ")
        target, *sources = operands.split(",")
        waiting -= {int(r) for r in re.findall(r"\bR(\d+)", ",".join(sources))}
        if operation.startswith("LDS"):
            first = int(re.search(r"R(\d+)", target)[1])
            waiting |= {first + i for i in range({"64": 2, "128": 4}.get(operation.split(".")[-1], 1))}
    return waiting


def test_a_stage_of_a_wider_tile_is_free_when_it_is_decoded():
    """There without a fence: all that was loaded on the way through a whole stage has been read."""
    for name, sass in tiles("grouped_kernel").items():
        if "LDSM" in sass:
            continue
        code = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", sass)
        full, free = re.findall(r"SYNCS\.EXCH\.64 URZ, \[UR\d+(\+0x\w+\])", sass)[:2]
        waits = [i for i, line in enumerate(code) if "SYNCS.PHASECHK" in line and full in line]
        arrivals = [i for i, line in enumerate(code) if "SYNCS.ARRIVE" in line and free in line]
        assert arrivals, name
        for arrival in arrivals:
            waited = max(i for i in waits if i < arrival)
            assert any("LDS" in line for line in code[waited:arrival]), name
            assert not unread(code[waited:arrival]), name


def test_rows_of_other_ctas_are_copied_behind_a_fence():
    """A pair's tokens are its first product's rows, stored by other CTAs and read by the copy engine."""
    for name, sass in tiles("pair_kernel").items():
        marks = " ".join(re.findall(r"FENCE\.VIEW\.ASYNC\.G|UTMALDG", sass))
        assert re.search("FENCE.VIEW.ASYNC.G( UTMALDG){4}$", marks), name  # the slabs of a stage


def test_tokens_are_copied_when_the_kernel_that_orders_them_is_done():
    """Weights, which are boxes in the public layout, are asked for before; those who multiply have the second
    wait."""
    for name, sass in tiles().items():
        marks = " ".join(re.findall("ACQBULK|UTMALDG", sass))
        before = "(UTMALDG ){2}" if "PlainWeights" in name else ""
        assert re.fullmatch(f"{before}ACQBULK (UTMALDG )+ACQBULK", marks), f"{name}: {marks}"

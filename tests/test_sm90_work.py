"""What each CTA of Hopper's products computes, on the CPU, from csrc/kernels/sm90/work.cuh's own source
(tests/cpp/sm90_work.cpp): all of it, once. And mistakes in it, all of which must be caught."""

import ctypes
from collections import defaultdict
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import ROOT, build, in_namespace, run_with, with_mistake
from test_sm90 import SHARED, uneven

STAGE = 4  # steps of K
TEAMS = {8: 1, 48: 1, 128: 2, 256: 1}  # tokens of a tile: CTAs of a team
FIELDS = ["cta", "n", "expert", "row_tile", "first_row", "count", "tokens", "begin", "end", "share",
          "product"]  # fmt: skip
# name: what the source says, what the mistake says
MISTAKES = {
    "rows that fill no tile left out": ("(rows + T::kTokens - 1) / T::kTokens", "rows / T::kTokens"),
    "the expert before": (") * problem.row_tiles <= index", ") * problem.row_tiles < index"),
    "an expert's last tile as full as the others": ("min(cut.each, rows - begin)", "cut.each"),
    "row tiles and tiles of tokens swapped": (
        "tile = local % tiles, row_tile",
        "row_tile = local % tiles, tile",
    ),
    "tiles of tokens counted from the expert": ("before + tile}", "tile}"),
    "the first of an expert's tiles for its last": ("tile = cut.tiles - 1;", "tile = 0;"),
    "all tiles as wide": ("min((T::kTokens - rows) / T::kStep, kNarrowest)", "0"),
    "narrower tiles counted as the widest": ("index -= items(narrowing)", "index -= items(0)"),
    "nothing but the last wave shared": ("run = (teams + left) * stages", "run = left * stages"),
    "one wave too many": ("--s.waves * teams", "s.waves * teams"),
    "shares that end a stage early": ("(number + 1) * run)", "(number + 1) * run - 1)"),
    "a rest from its begin on": ("s.rest * kStageSteps, problem.steps", "0, problem.steps"),
    "a head as long as its rest": ("s.head * kStageSteps, s.number", "s.rest * kStageSteps, s.number"),
    "heads of the two products exchanged": ("if (second())", "if (!second())"),
    "both products the first": ("const int product = second();", "const int product = 0;"),
    "a team's CTAs alike": ("row_tile * team() + rank()", "row_tile * team()"),
    "no sums over a warp's lanes": ("if (lane >= step) x[j] += before;", ""),
    "128 experts summed": ("sum += __shfl_sync(~0u, x[j], 31);", ""),
    "what is before the first expert left as it was": ("first_of[0] = to(first_of[0], 0);", ";"),
    "offsets believed": ("min(max(begin, 0), static_cast<int>(p.R))", "begin"),
    "experts counted from the first of all": ("p.ids[i] - p.first_expert", "p.ids[i]"),
    "few items for nobody": ("s.begin = number, s.end = number + 1;", ""),
}
BARRIERS = {  # left out, and what stands behind
    "sums of what others still write": "sums([](int2 own) { return own.x; }",
    "choices counted while others still clear": "for (int i = threadIdx.x; i < R;",
    "sums of what others still count": "sums([](int2 own) { return own.x <<",
}
MISTAKES |= {name: ("__syncthreads();\n    " + after, after) for name, after in BARRIERS.items()}


def source(name: str, mistake: tuple[str, str] | None) -> str:
    """work.cuh and tests/cpp/sm90_work.cpp in a namespace of their own."""
    work = with_mistake((ROOT / "csrc/kernels/sm90/work.cuh").read_text(), mistake)
    return in_namespace(name, work + (ROOT / "tests/cpp/sm90_work.cpp").read_text(), "sm90")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    headers = ("csrc/kernels/sm90/gemm_problem.h", "csrc/kernels/sm90/tile.h", "tests/cpp/simt.h")
    headers = ["<algorithm>", *(f'"{path}"' for path in headers)]
    return build(tmp_path_factory.mktemp("cpp"), headers, source, MISTAKES)


def listed(run, tokens, offsets, row_tiles, steps, ctas, ids=None, awaits=0, R=None, first_expert=0):
    """Every part of every CTA."""
    R, E = offsets[-1] if R is None else R, len(offsets) - 1
    array = lambda x: (ctypes.c_int * max(len(x), 1))(*x)  # noqa: E731
    out = np.zeros(len(FIELDS) * (R + E + 2 * ctas + 1) * row_tiles * TEAMS[tokens] * 2, np.int32)
    sizes = array([R, E, row_tiles, TEAMS[tokens], steps, ctas, awaits, first_expert])
    at = out.ctypes.data_as(ctypes.POINTER(ctypes.c_int))
    n = run(tokens, ids is not None, array(offsets), array([] if ids is None else ids), sizes, at)
    rows = out[:n].reshape(-1, len(FIELDS)).tolist()
    return [SimpleNamespace(**dict(zip(FIELDS, row, strict=True))) for row in rows]


def width(tokens, count):
    """Of the products of a tile of so many rows."""
    return tokens if tokens < 128 else max(tokens // 2, -(-count // (tokens // 4)) * (tokens // 4))


def check(parts, tokens, offsets, row_tiles, steps, ctas):
    """Each stage of each tile once, by one CTA or by two neighbours: the head, which comes first of all, and
    the rest, which comes last; and where there is more than a tile for each, all do as much."""
    team, total = TEAMS[tokens], sum(-(-rows // tokens) for rows in np.diff(offsets))
    tiles = defaultdict(list)
    for p in parts:
        assert p.begin % STAGE == 0 and p.begin < p.end and (p.end == steps or p.end % STAGE == 0)
        assert p.share == p.cta // team and p.row_tile % team == p.cta % team
        tiles[p.expert, p.row_tile, p.first_row, p.count, p.tokens].append(p)
    last = {p.cta: p.n for p in parts}
    for halves in tiles.values():
        halves.sort(key=lambda p: p.begin)
        assert halves[0].begin == 0 and halves[-1].end == steps
        assert all(a.end == b.begin for a, b in pairwise(halves)) and len(halves) <= 2
        if len(halves) == 2:
            head, rest = halves
            assert rest.cta == head.cta + team and head.n == 0 and rest.n == last[rest.cta]
    for e, (begin, end) in enumerate(pairwise(offsets)):
        for row_tile in range(row_tiles * team):
            mine = sorted((first, count) for *of, first, count, _ in tiles if of == [e, row_tile])
            assert len(mine) == -(-(end - begin) // tokens) and all(0 < count <= tokens for _, count in mine)
            after = [begin, *(first + count for first, count in mine)]
            assert after == [*(first for first, _ in mine), end]
    assert len(tiles) == row_tiles * team * total
    if tokens == 8:  # tiles of tokens are numbered in order, for pairs
        for row_tile in range(row_tiles * team):
            assert [t[4] for t in sorted(tiles) if t[1] == row_tile] == list(range(total))
    costs = [0] * ctas
    for p in parts:
        costs[p.cta] += width(tokens, p.count) * (p.end - p.begin) / steps
    # whole waves are alike to within an item; of what is shared, two of the widest against a narrowest one
    assert max(costs) - min(costs) <= 1.5 * tokens or len(tiles) <= ctas
    whole = sorted((p.cta, p.n, -width(tokens, p.count)) for p in parts if p.end - p.begin == steps)
    assert all(a[2] <= b[2] for a, b in pairwise(whole) if a[0] == b[0])  # the widest first
    work = [sum(-(-(p.end - p.begin) // STAGE) for p in parts if p.cta == cta) for cta in range(ctas)]
    assert max(work) <= (min(work) + 1 if len(tiles) > ctas else -(-steps // STAGE))


def check_pair(run, offsets, row_tiles, steps, ctas, first_expert=2):
    """Both products, from the choices in any order; heads are of the first product's last experts, and of the
    second one's first."""
    E, rows = len(offsets) - 1, np.diff(offsets)
    ids = np.repeat(np.arange(E), rows) + first_expert
    ids = np.random.default_rng(0).permutation(np.concatenate([ids, [0, first_expert + E, -1]])).tolist()
    for second, awaits in enumerate((0, 3)):
        parts = listed(run, 8, offsets, row_tiles, steps, ctas, ids, awaits, len(ids), first_expert)
        check(parts, 8, offsets, row_tiles, steps, ctas)
        assert all(p.product == second for p in parts)
        heads = [p.expert for p in parts if p.end < steps]
        whole = [p.expert for p in parts if p.begin == 0 and p.end == steps]
        assert heads and (max(heads) <= np.median(whole) if second else min(heads) >= np.median(whole))


def ragged(E, most, seed=0):
    rows = np.random.default_rng(seed).integers(0, most, E) * (np.arange(E) % 5 != 3)
    return [0, *np.cumsum(rows).tolist()]


# tokens of a tile, offsets, tiles of weight rows, steps of K, CTAs
CASES = {
    "many tiles": (8, ragged(40, 20), 3, 9, 7),
    "300 experts": (48, ragged(300, 90), 1, 9, 4),
    "teams": (128, ragged(9, 500), 2, 13, 6),
    "wide": (256, ragged(7, 900, 1), 1, 24, 5),
    "three of the widest": (256, [0, 256, 512, 768, *range(769, 775)], 1, 1, 6),
    "CTAs without work": (128, [0, 5, 5, 40], 1, 4, 12),
    "one CTA": (8, [0, 3], 2, 1, 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_everything_is_computed_once(library, case):
    check(listed(library.run_as_it_is, *case), *case)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_everything_is_computed_once_whatever_the_sizes(library, data):
    tokens = data.draw(st.sampled_from(list(TEAMS)))
    rows = data.draw(st.lists(st.integers(0, 3 * tokens), min_size=1, max_size=12))
    row_tiles, steps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    ctas = TEAMS[tokens] * data.draw(st.integers(1, 6))
    case = tokens, [0, *np.cumsum(rows).tolist()], row_tiles, steps, ctas
    check(listed(library.run_as_it_is, *case), *case)


def early(run, rows, ctas=132):
    """CTAs that come for a tile's sums before its head is done, if a product takes as long as it is wide."""
    _, N, K = SHARED
    steps, clocks, done, comes = -(-K // 64), defaultdict(int), {}, {}
    for p in listed(run, 128, [0, *np.cumsum(rows).tolist()], N // 512, steps, ctas):  # a CTA's in order
        tile = p.expert, p.row_tile, p.first_row
        if p.begin > 0:
            comes[tile] = clocks[p.cta]
        clocks[p.cta] += width(128, p.count) * (p.end - p.begin)
        if p.end < steps:
            done[tile] = clocks[p.cta]
    return [tile for tile, time in comes.items() if time < done[tile]]


def test_one_comes_early_in_the_graph_that_is_replayed(library):
    """Or test_sm90.py would not see that a flag stays up: it did not with its rows in turn."""
    assert early(library.run_as_it_is, uneven(128, 64))
    assert not early(library.run_as_it_is, [128, 64] * 12)


@pytest.mark.parametrize("ctas", [4, 7])
def test_both_products_of_a_pair(library, ctas):
    check_pair(library.run_as_it_is, ragged(50, 12), 3, 10, ctas)


LIES = [[0, 900, 3, -7, 40], [20, 50, 40, 30]]


def check_lies(run, lies=LIES):
    """Offsets may say anything: no tile leaves the rows that there are."""
    for tokens, offsets in product((48, 128, 256), lies):
        parts = listed(run, tokens, offsets, 2, 5, 4, R=40)
        assert parts and all(p.first_row >= 0 and 0 < p.count <= 40 - p.first_row for p in parts)


def test_offsets_that_lie(library):
    check_lies(library.run_as_it_is, [*LIES, [2**31 - 1, -(2**31), 12, 2**31 - 1]])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(library, mistake):
    run = run_with(library, MISTAKES, mistake)
    with pytest.raises(AssertionError):
        for case in CASES.values():
            check(listed(run, *case), *case)
        check_pair(run, ragged(50, 12), 3, 10, 4)
        check_lies(run)

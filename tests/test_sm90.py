"""Hopper's grouped product, tile by tile: exact decode, sums within their chain's bound, bits a row's own.

The tile is read from gemm_plan: the cases follow the table, and a test fails when it outgrows them.
"""

from itertools import accumulate

import pytest
import torch
from cases import Weights, epilogue_steps, lively, poison, random_packed, random_sf
from compare import assert_gemm, assert_same_bits
from conftest import missing_hopper
from sanitized import TILES as SANITIZED

from nvfp4_moe import formats, ops, reference

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sm90,
    pytest.mark.skipif(missing_hopper() is not None, reason=str(missing_hopper())),
]

# The order in which a chunk of 64 k is summed: csrc/kernels/sm90/decode.cuh, at its end.
K_ORDER = torch.tensor([p // 2 % 4 * 16 + p // 32 * 8 + p % 2 * 4 + p // 8 % 4 for p in range(64)])
NARROW = (4, 392, 544)  # E, N, K: N % 128 = 8, K % 64 = 32, both of them the GEMM's least steps
WIDE = (96, 1536, 224)  # so many weight rows that the table need not halve a tile to fill the chip
# Tiles for more than one wave and K of three stages: the last wave is shared out along K.
SHARED = (24, 1536, 544)
ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 20, 24, 28, 31, 40, 48, 64, 70, 90, 112, 128, 129, 150, 200)  # an expert
CASES = [
    *((rows, *NARROW) for rows in ROWS),
    *((rows, *WIDE) for rows in (1, 3, 8, 16)),
    *((rows, *SHARED) for rows in (1, 9, 16, 24, 31, 48, 100, 150)),
]


def tile(rows, E, N, K) -> str:
    return ops.gemm_plan(rows * E, N, K, E, "bf16").split()[1]


def named(case) -> str:
    return "x".join(map(str, case))


@pytest.fixture(params=CASES, ids=named)
def case(request):
    """(rows an expert, E, N, K); a failure's captured output names the tile."""
    print("tile", tile(*request.param), "for rows, E, N, K =", request.param)
    return request.param


@pytest.fixture(autouse=True)
def faults_show_in_their_own_test():
    yield
    torch.cuda.synchronize()


def weights(E, N, K, alphas=1) -> Weights:
    """Any codes; scales of 1/4 to 2 with one in fifty from anywhere, zero included."""
    sf = torch.randint(40, 64, (E, N, K // 16), dtype=torch.uint8)
    sf = torch.where(torch.rand(sf.shape) < 0.02, torch.randint_like(sf, 0x7F), sf)
    alpha = torch.exp(torch.randn(E, alphas)) * 2.0**-9
    alpha = alpha[:, 0].contiguous() if alphas == 1 else alpha
    parts = (random_packed(E, N, K // 2), sf.view(torch.float8_e4m3fn), alpha)
    return Weights(*(t.to(DEVICE) for t in parts))


def ragged(rows, E) -> list[int]:
    """Rows of each expert, none or twice as many among them; E * rows together, some of them nobody's."""
    counts = [rows, 0, 2 * rows, rows] * (E // 4)
    counts[-1] -= min(rows, 3)
    return counts


def offsets_of(counts):
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=DEVICE)


def tokens(R, K):
    return lively(R, K, dtype=torch.bfloat16).to(DEVICE)


def gemm(a, w, counts, bias=None):
    """a is bf16 [R, K] or (packed, sf, scale)."""
    operands = a if isinstance(a, tuple) else (a, None, None)
    return ops.grouped_gemm(*operands, w.b, ops.remap_sf(w.sf), w.alpha, offsets_of(counts), bias)


def dequantized(w, experts=slice(None), dtype=torch.float32):
    b, sf = w.b[experts], w.sf.view(torch.uint8)[experts].view(w.sf.dtype)
    one = torch.ones((), device=DEVICE)
    return ops.dequantize(b.flatten(0, -2), sf.flatten(0, -2), one, dtype).view(*b.shape[:-1], -1)


def check(got, a, w, counts, a_scale=None, bias=None):
    """Experts with as many rows as each other together."""
    alpha, begins = reference.gemm.spread_alpha(w.alpha, w.b.shape[1]), [0, *accumulate(counts)]
    s = None if a_scale is None else a_scale.expand(len(a))
    for count in sorted({*counts} - {0}):
        experts = [e for e, rows in enumerate(counts) if rows == count]
        rows = torch.tensor([begins[e] for e in experts])[:, None] + torch.arange(count)
        assert_gemm(
            got[rows],
            a[rows],
            dequantized(w, experts),
            alpha[experts, None],
            None if s is None else s[rows],
            None if bias is None else bias[experts, None],
            f"experts {experts} of {len(counts)}, {count} rows each",
            K_ORDER,
        )
    assert not got[begins[-1] :].view(torch.int16).any(), f"rows of no expert, {begins[-1]} and on, are +0"


def test_the_cases_reach_every_tile_of_the_table():
    table = {
        tile(rows, E, N, 256)
        for rows in range(1, 520)
        for E in (1, 2, 8, 48, 64, 128, 512)
        for N in (128, 1024, 4096, 16384)
    }
    assert {tile(*c) for c in CASES} == table
    assert {tile(*c) for c in SANITIZED} == table


def test_every_tile_is_a_kernel_of_this_chip_and_runs():
    ran = {}
    for c in CASES:
        rows, E, N, K = c
        w, a = weights(E, N, K), tokens(rows * E, K)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            gemm(a, w, [rows] * E)
            torch.cuda.synchronize()
        names = {event.name for event in profile.events()}
        if not names:
            pytest.skip("the profiler sees no kernels here")
        found = [n for n in names if "sm90" in n and "grouped_kernel" in n]
        assert len(found) == 1, f"tile {tile(*c)}, case {c}: ran {sorted(names)}"
        ran.setdefault(tile(*c), set()).add(found[0])
    kernels = [k for found in ran.values() for k in found]
    assert len(set(kernels)) == len(kernels) == len(ran), f"one kernel a tile: {ran}"


class TestEveryTile:
    @pytest.mark.parametrize("alphas", [1, 2])
    @pytest.mark.parametrize("kind", ["bf16", "codes, a scale a row", "codes, one scale"])
    def test_sums_are_within_the_bound_of_their_chain(self, case, kind, alphas):
        rows, E, N, K = case
        w, x, counts = weights(E, N, K, alphas), tokens(rows * E, K), ragged(rows, E)
        bias = torch.randn(E, N, device=DEVICE) if alphas == 2 else None
        poison((rows * E, N), torch.bfloat16, DEVICE)
        poison((rows * E, -(-K // 64) * 64), torch.bfloat16, DEVICE)  # the reordered activations
        if kind == "bf16":
            return check(gemm(x, w, counts, bias), x, w, counts, None, bias)
        scale = ops.tensor_scale(x)
        a = ops.quantize_rows(x) if kind == "codes, a scale a row" else (*ops.quantize(x, scale), scale)
        decoded = ops.dequantize(*a[:2], torch.ones((), device=DEVICE), torch.float32)
        check(gemm(a, w, counts, bias), decoded, w, counts, a[2], bias)

    @pytest.mark.parametrize("codes", ["random", "every code with every scale"])
    def test_one_hot_activations_give_the_weights_back_bit_for_bit(self, case, codes):
        rows, E, N, _ = case
        K = 96
        w = weights(E, N, K)
        if codes == "random":
            w.sf = random_sf(E, N, K // 16).to(DEVICE)
        else:  # each of the first 127 rows meets all 16 codes, each with its own scale in each block
            e, n, s = (torch.arange(size) for size in (E, N, K // 16))
            byte = (5 * e[:, None, None] + n[:, None] + 21 * s) % 0x7F
            w.sf = byte.to(torch.uint8).view(torch.float8_e4m3fn).to(DEVICE)
            w.b = formats.pack((torch.arange(K) + n[:, None] // 0x7F) % 16).expand(E, N, K // 2)
            w.b = w.b.contiguous().to(DEVICE)
        w.alpha = torch.ones(E, device=DEVICE)
        got = torch.full((E, N, K), torch.nan, device=DEVICE, dtype=torch.bfloat16)
        eye = torch.eye(K, device=DEVICE, dtype=torch.bfloat16)
        for first in range(0, K, rows):
            hot = torch.arange(first, first + rows, device=DEVICE) % K
            y = gemm(eye[hot].repeat(E, 1), w, [rows] * E).view(E, rows, N)
            got[:, :, hot] = y.transpose(1, 2)
        want = dequantized(w, dtype=torch.bfloat16)
        wrong = got != want
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()} [e, n, k], first {wrong.nonzero()[0].tolist()}: got "
            f"{got[wrong][0].item()}, want {want[wrong][0].item()}; in {int(wrong.any(2).sum())} weight rows"
        )

    def test_runs_are_bitwise_equal(self, case):
        rows, E, N, K = case
        w, a, counts = weights(E, N, K, 2), tokens(rows * E, K), ragged(rows, E)
        first = gemm(a, w, counts)
        for i in range(5):
            assert_same_bits(gemm(a, w, counts), first.cpu(), f"run {i + 2}")

    def test_nan_activations_stay_in_their_rows(self, case):
        rows, E, N, K = case
        w, a, counts = weights(E, N, K), tokens(rows * E, K), [rows] * E
        want = gemm(a, w, counts)
        bad = torch.rand(rows * E) < 0.3
        bad[0] = True
        a[bad] = torch.nan
        want[bad] = torch.nan
        assert_same_bits(gemm(a, w, counts), want.cpu())

    def test_a_nan_scale_poisons_exactly_its_row(self, case):
        rows, E, N, K = case
        w, a, counts = weights(E, N, K), tokens(rows * E, K), [rows] * E
        a[:, : K // 2] = 0  # a NaN times zero is one
        want = gemm(a, w, counts)
        for e, n, s in (
            (0, 0, 0),
            (0, 5, K // 16 - 1),
            (E - 1, N - 1, 1),
            (1, N // 2, 3),
            (1, N // 2 - 1, 2),
        ):
            w.sf.view(torch.uint8)[e, n, s] = 0x7F
            w.b[e, n] &= 0x88  # and times code zero too
            want[e * rows : (e + 1) * rows, n] = torch.nan
        assert_same_bits(gemm(a, w, counts), want.cpu())


@pytest.mark.parametrize("rows", [1, 12, 64])
def test_every_step_of_the_epilogue_is_rounded_in_the_contracts_order(rows):
    for (codes, sf, scale), w, _, bias, want in epilogue_steps():
        a = (codes[:rows].to(DEVICE), sf[:rows].to(DEVICE), scale[:rows].to(DEVICE))
        w = Weights(*(t.to(DEVICE) for t in (w.b, w.sf, w.alpha)))
        got = gemm(a, w, [rows], None if bias is None else bias.to(DEVICE))
        assert_same_bits(got, want[:rows])


@pytest.mark.parametrize("size", [NARROW, WIDE, SHARED], ids=str)
def test_a_row_has_the_same_bits_alone_and_at_any_place_of_any_batch(size):
    E, N, K = size
    w, mine = weights(E, N, K, 2), tokens(E, K)  # one row for each expert
    alone = torch.cat([gemm(mine[e : e + 1], w, [0] * e + [1] + [0] * (E - 1 - e)) for e in range(E)])
    for rows in ROWS[:8] if size == WIDE else ROWS:
        for place in {0, rows // 2, rows - 1}:
            a = tokens(E * rows, K)
            a[place::rows] = mine
            got = gemm(a, w, [rows] * E)[place::rows]
            assert_same_bits(got, alone.cpu(), f"tile {tile(rows, *size)}, row {place} of {rows} an expert")


def test_a_row_of_any_kind_of_batch_has_its_bits():
    """Skewed, so that an expert has many more rows than the tile was chosen for."""
    E, N, K = NARROW
    w, a = weights(E, N, K), tokens(700, K)
    want = gemm(a, w, [0, 700, 0, 0])
    for count in (1, 7, 65, 300, 699):
        assert_same_bits(gemm(a[:count], w, [0, count, 0, 0]), want[:count].cpu(), f"{count} rows")


def test_narrow_tiles_of_half_the_rows_are_shared_too():
    """128x8 is chosen for one wave at most: only an expert with more rows than the others makes another."""
    E, N, K = 4, 4224, 544
    w, a, counts = weights(E, N, K), tokens(20, K), [17, 1, 1, 1]
    assert tile(5, E, N, K) == "128x8"
    check(gemm(a, w, counts), a, w, counts)


def uneven(first, then):
    """Experts' rows for SHARED. Where tiles of 128 rows end and those of 64 begin, a CTA comes early for what
    its neighbour leaves, if that place is inside a share (test_sm90_work.py)."""
    return [first] * (SHARED[0] // 2 - 1) + [then] * (SHARED[0] // 2 + 1)


@pytest.mark.parametrize("rows", [(1, 1), (9, 9), (31, 31), (100, 100), (128, 64)], ids=named)
def test_a_graph_whose_ctas_share_tiles_is_replayed(rows):
    """What a CTA left in one replay must not be taken for what it leaves in the next."""
    E, N, K = SHARED
    counts = uneven(*rows)
    w, a = weights(E, N, K), tokens(sum(counts), K)
    gemm(a, w, counts)
    sf, offsets, graph = ops.remap_sf(w.sf), offsets_of(counts), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.grouped_gemm(a, None, None, w.b, sf, w.alpha, offsets)
    for replay in range(6):
        a.copy_(tokens(sum(counts), K))
        graph.replay()
        assert_same_bits(out, gemm(a, w, counts).cpu(), f"replay {replay}")


def zipf(R, E):
    share = 1 / torch.arange(1, E + 1, dtype=torch.float64)
    return torch.multinomial(share, R, replacement=True).bincount(minlength=E).tolist()


ROUTINGS = {
    "all rows to one expert": lambda R, E: [0] * (E // 2) + [R] + [0] * (E - 1 - E // 2),
    "all rows to the last": lambda R, E: [0] * (E - 1) + [R],
    "nobody": lambda R, E: [0] * E,
    "a row each for some": lambda R, E: [int(e % 3 == 0) for e in range(E)],
    "Zipf": zipf,
    "Zipf, the busiest last": lambda R, E: zipf(R, E)[::-1],
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("R", [64, 300, 3000])
def test_any_routing_is_within_the_bound(routing, R):
    E, N, K = 64, 136, 160
    w, a, counts = weights(E, N, K), tokens(R, K), ROUTINGS[routing](R, E)
    poison((R, N), torch.bfloat16, DEVICE)
    check(gemm(a, w, counts), a, w, counts)


@pytest.mark.parametrize(
    "N, K", [(8, 32), (16, 64), (128, 128), (264, 96), (1000, 1056), (4096, 7168)], ids=str
)
@pytest.mark.parametrize("rows", [1, 6, 14, 40, 130, 150])
def test_sizes_that_no_tile_divides(rows, N, K):
    w, a = weights(2, N, K), tokens(2 * rows, K)
    poison((2 * rows, N), torch.bfloat16, DEVICE)
    check(gemm(a, w, [rows, rows]), a, w, [rows, rows])


@pytest.mark.parametrize("beyond", ["rows", "columns"])
@pytest.mark.parametrize("K", [512, 544])
def test_nan_in_the_padding_of_the_scales_changes_nothing(beyond, K):
    """remap_sf writes zeros there; a buffer that something else filled may hold anything."""
    E, N, rows, S = 4, 392, 5, K // 16
    w, a, counts = weights(E, N, K), tokens(4 * 5, K), [rows] * E
    sf = ops.remap_sf(w.sf)
    row, column = (t.to(DEVICE) for t in formats.sf_coord(torch.arange(sf.shape[1]), S))
    sf.view(torch.uint8)[:, row >= N if beyond == "rows" else column >= S] = 0x7F
    got = ops.grouped_gemm(a, None, None, w.b, sf, w.alpha, offsets_of(counts))
    assert_same_bits(got, gemm(a, w, counts).cpu())


@pytest.mark.parametrize("E", [1024, 2048, 4096])
@pytest.mark.parametrize("rows", [1, 6, 14, 40, 60])
def test_thousands_of_experts(E, rows):
    w, a = weights(E, 8, 32), tokens(E * rows, 32)
    got, e = gemm(a, w, [rows] * E), E - 1
    assert_gemm(got[-rows:], a[-rows:], dequantized(w, e), w.alpha[e], None, None, "the last", K_ORDER)


@pytest.mark.parametrize("rows", [2, 8, 20, 48, 100, 150])
@pytest.mark.parametrize(
    "offsets",
    [[0, 3, 2, 8], [-5, 2, 100, 3], [7, 7, 7, 7], [8, 5, 3, 0], [2**31 - 1, -(2**31), 0, 5]],
    ids=str,
)
def test_offsets_that_lie_do_not_fault(offsets, rows):
    """Outputs may be wrong; the device goes on, and what is computed next is right."""
    w, a = weights(3, 136, 96), tokens(3 * rows, 96)
    honest = gemm(a, w, [rows] * 3)
    lies = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    ops.grouped_gemm(a, None, None, w.b, ops.remap_sf(w.sf), w.alpha, lies)
    torch.cuda.synchronize()
    assert_same_bits(gemm(a, w, [rows] * 3), honest.cpu())


@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("alphas", ["one", "a row's own"])
@pytest.mark.parametrize("rows", ROWS)
def test_linear_takes_an_alpha_for_each_row_of_the_weights(rows, alphas, compute):
    N, K = NARROW[1:]
    w, x, bias = weights(1, N, K), tokens(rows, K), torch.randn(N, device=DEVICE)
    alpha = w.alpha[0] if alphas == "one" else torch.rand(N, device=DEVICE) * 0.01 + 1e-3
    got, scale = ops.linear(x, w.b[0], ops.remap_sf(w.sf)[0], alpha, compute, bias), None
    if compute == "nvfp4":
        packed, sf, scale = ops.quantize_rows(x)
        x = ops.dequantize(packed, sf, torch.ones((), device=DEVICE), torch.float32)
    what = f"tile {tile(rows, 1, N, K)}"
    assert_gemm(got, x, dequantized(w, 0), alpha, scale, bias, what, K_ORDER)

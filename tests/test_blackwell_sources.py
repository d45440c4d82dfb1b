"""Blackwell's set-up kernel, the arrays it fills and the epilogue's node, on the CPU, from their own sources
(tests/cpp/blackwell.cpp); and mistakes in them, all of which must be caught."""

import ctypes

import pytest
import torch
from cases import epilogue_steps, lively, ragged_offsets, random_weights
from simt import ROOT, build, in_namespace, run_with, with_mistake
from test_gemm import check_groups

from nvfp4_moe import formats, reference

GUARD = 1 << 20
CUTLASS = (
    "cute/tensor.hpp",
    "cutlass/detail/sm100_blockscaled_layout.hpp",
    "cutlass/numeric_conversion.h",
    "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp",
)
HEADERS = ("groups.h", "set_up.cuh", "shadow.h", "epilogue.cuh")
# name: what the source says, what the mistake says
MISTAKES = {
    "weights' scales by size, not cosize": ("SfLayout{p.N, S}.cosize()", "(p.N * S)"),
    "tokens' scales by size, not cosize": ("s.atom * SfLayout{1, S}.cosize()", "s.begin * S"),
    "an atom row too few for a ragged expert": ("(rows + 127) / 128", "rows / 128"),
    "scales of weights and tokens swapped": (
        "tokens_sf[e] = sf + s.atom * SfLayout{1, S}.cosize();",
        "tokens_sf[e] = sf + s.atom * SfLayout{1, S}.cosize(); std::swap(weights_sf[e], tokens_sf[e]);",
    ),
    "scale layouts of weights and tokens swapped": (
        "tile_atom_to_shape_SFA(cute::make_shape(N, s.rows, K, 1))",
        "tile_atom_to_shape_SFA(cute::make_shape(s.rows, N, K / 2, 1))",
    ),
    "the neighbour's weights": ("p.b + e * p.N", "p.b + (e ? e - 1 : 0) * p.N"),
    "the neighbour's alpha": ("alpha + e * alphas", "alpha + (e ? e - 1 : 0) * alphas"),
    "gate's alpha for up": ("n >= N / 2", "n > N / 2"),
    "the neighbour's bias": ("bias + e * N", "bias + (e ? e - 1 : 0) * N"),
    "the first row's scale for all": ("a_scale_per_row ? row : 0", "0"),
    "the bias forgotten": ("{p.alpha, p.a_scale, p.bias,", "{p.alpha, p.a_scale, nullptr,"),
    "rows of weights too far apart": ("tokens_stride[e] = {p.K,", "tokens_stride[e] = {p.K + 32,"),
    "rows of the output too far apart": ("out_stride[e] = {{}, p.N,", "out_stride[e] = {{}, p.N - 8,"),
    "tokens from the next row on": ("a_packed + s.begin * (p.K / 2)", "a_packed + (s.begin + 1) * (p.K / 2)"),
    "output from the row before on": ("p.out + s.begin", "p.out + (s.begin ? s.begin - 1 : 0)"),
    "row scales counted from the expert": ("begin[e] = s.begin", "begin[e] = 0"),
    "no padding behind K": ("cudaMemsetAsync(spread, 0,", "cudaMemsetAsync(spread, 0x7f,"),
    "scales of a row one atom too far": (
        "place / 128 * layout.cosize()",
        "(place / 128 + 1) * layout.cosize()",
    ),
    "scales of a row by size, not cosize": ("place / 128 * layout.cosize()", "place * layout.cols"),
    "scales in another order in the atom": ("c / 4 * SfLayout::kAtom + c % 4", "c"),
    "experts end where the one before ended": (
        "[](int a, int b) { return max(a, b); }",
        "[](int a, int) { return a; }",
    ),
    "the atoms of the experts before forgotten": ("s.atom = scan(", "s.atom = 0 * scan("),
    "nothing carried to the next 256 experts": ("carry = lead;", ""),
    "experts beyond 256 left out": (
        "base / kSetUpThreads % gridDim.x == blockIdx.x",
        "base / kSetUpThreads == blockIdx.x",
    ),
    "the first rows of a CTA only": ("first + kSetUpRows); ++r", "first + kSetUpRows / 2); ++r"),
    "rows of no expert left as they were": ("places[i] < 0 && !p.leave_tail", "false"),
    "a_scale forgotten": (" * p.scale_of(row(i))", ""),
    "alpha times a_scale first": (
        "p.alpha_of(e, n(i)) * p.scale_of(row(i))",
        "(p.alpha_of(e, n(i)) * p.scale_of(row(i)))",
    ),
    "a_scale before alpha": (
        "p.alpha_of(e, n(i)) * p.scale_of(row(i))",
        "p.scale_of(row(i)) * p.alpha_of(e, n(i))",
    ),
    "product and bias rounded at once": (
        "y[i] += p.bias_of(e, n(i))",
        "y[i] = fmaf(acc[i] * p.alpha_of(e, n(i)), p.scale_of(row(i)), p.bias_of(e, n(i)))",
    ),
    "product rounded to BF16 before the bias": ("y[i] += ", "y[i] = float(cutlass::bfloat16_t(y[i])) + "),
    "the next row's scale": ("min(row0 + cute", "min(row0 + 1 + cute"),
    "alpha and bias of 8 columns on": ("min(n0 + cute", "min(n0 + 8 + cute"),
    "row scales from the expert's first row on": ("params->begin[e] + rows", "rows"),
    "column and row of a value swapped": ("min(n0 + cute::get<0>", "min(n0 + cute::get<1>"),
    "the expert's number lost": ("e = cute::get<3>(args.tile_coord_mnkl)", "e = 0"),
    "bias never added": ("if (p.bias)", "if (false)"),
    "no barrier behind the totals": (
        "totals[warp] = through;\n  __syncthreads();",
        "totals[warp] = through;",
    ),
    "no barrier behind the places": ("__syncthreads();\n  for (int i = t / 32;", "for (int i = t / 32;"),
}
LIES = {"from": [0, 30, 20, 40, -7, 50], "to": [0, 30, 30, 40, 40, 50]}  # what they are taken for
# offsets, N, K, bias: ragged and empty experts over several CTAs and atoms; many experts, in more than one
# round of a CTA's threads; a tail of no expert; one CTA
CASES = [
    ([0, 150, 150, 290, 390], 136, 96, True),
    (ragged_offsets(40, 600).tolist(), 8, 32, False),
    ([0, 1, 3, 40], 16, 64, True),
]


def source(name: str, mistake: tuple[str, str] | None) -> str:
    """The headers and tests/cpp/blackwell.cpp in a namespace of their own."""
    text = "\n".join((ROOT / "csrc/kernels/blackwell" / header).read_text() for header in HEADERS)
    text = with_mistake(text, mistake)
    text += (ROOT / "tests/cpp/blackwell.cpp").read_text()
    return in_namespace(name, text)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    headers = ['"tests/cpp/product.h"', *(f"<{path}>" for path in CUTLASS)]
    return build(tmp_path_factory.mktemp("cpp"), headers, source, MISTAKES)


def guarded(t):
    """With NaN on both sides, where mistakes may read and write."""
    if t is None:
        return None, None
    room = torch.full((2 * GUARD + t.nbytes,), 0x7F, dtype=torch.uint8)
    inside = room[GUARD : GUARD + t.nbytes]
    inside.copy_(t.contiguous().view(-1).view(torch.uint8))
    return inside.data_ptr(), inside.view(t.dtype).view(t.shape)


def product(run, a, w, offsets, bias, R, backwards):
    """bf16 [R, N]; `backwards`: the order of a CTA's threads."""
    (E, N), K = w.b.shape[:2], 2 * w.b.shape[2]
    out = torch.full((R, N), float("nan"), dtype=torch.bfloat16)
    room = R // 128 + min(E, R), formats.sf_cosize(1, K // 16)
    scales = torch.full(room, 0x7F, dtype=torch.uint8)
    tensors = (*a, w.b, w.b_sf, w.alpha, bias, offsets, out, scales)
    at, kept = zip(*map(guarded, tensors), strict=True)
    sizes = R, N, K, E, w.alpha.numel() // max(E, 1), a[2].numel(), backwards
    run((ctypes.c_void_p * 10)(*at), (ctypes.c_int64 * 7)(*sizes))
    assert not (kept[-1] == 0x7F).any(), "padding of scales not written: 0 * NaN is not 0"
    return kept[-2]


def check(run, offsets, N, K, bias, alphas=1, per_row=True, means=None):
    """`means`: honest offsets, where those given lie."""
    means = torch.tensor(means or offsets, dtype=torch.int32)
    R, E = int(means[-1]) + 3, len(offsets) - 1
    w, x = random_weights(E, N, K, alphas), lively(R, K)
    a = reference.quantize_rows(x) if per_row else (*reference.quantize(x, s := reference.tensor_scale(x)), s)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    bias = torch.randn(E, N) if bias else None
    values = reference.dequantize(*a[:2], torch.ones(()))
    for backwards in (False, True):
        check_groups(product(run, a, w, offsets, bias, R, backwards), values, w, means, a[2], bias)


def check_rounding(run):
    for a, w, offsets, bias, want in epilogue_steps():
        assert torch.equal(product(run, a, w, offsets, bias, len(want), False), want)


@pytest.mark.parametrize("case", CASES, ids=["several atoms", "600 experts", "one CTA"])
@pytest.mark.parametrize("alphas, per_row", [(1, True), (2, False)])
def test_the_set_up_kernel_describes_the_product(library, case, alphas, per_row):
    check(library.run_as_it_is, *case, alphas, per_row)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0], [5, 5, 5]], ids=str)
def test_nothing_to_multiply(library, offsets):
    check(library.run_as_it_is, offsets, 8, 32, False)


def test_every_step_of_the_epilogue_is_rounded_in_the_contracts_order(library):
    check_rounding(library.run_as_it_is)


def test_offsets_that_lie(library):
    check(library.run_as_it_is, LIES["from"], 24, 64, True, means=LIES["to"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(library, mistake):
    run = run_with(library, MISTAKES, mistake)
    with pytest.raises(AssertionError):
        for case in CASES:
            check(run, *case, alphas=2)
        check(run, LIES["from"], 24, 64, True, means=LIES["to"])
        check_rounding(run)

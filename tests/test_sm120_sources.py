"""sm_120's kernel on the CPU, from its own source (tests/cpp/sm120_product.cpp) behind the set-up kernel,
with tests/cpp/warp.h in the place of ptx.cuh; and mistakes in it, all of which must be caught."""

import ctypes
import re

import pytest
import torch
from cases import epilogue_steps, lively, ragged_offsets, random_weights
from compare import assert_same_bits
from simt import ROOT, build, in_namespace, run_with, with_mistake
from test_blackwell_sources import guarded
from test_gemm import check_groups

from nvfp4_moe import formats, reference

HEADERS = ("blackwell/groups.h", "blackwell/set_up.cuh", "sm120/gemm.cuh")
BEFORE = ("tests/cpp/product.h", "tests/cpp/warp.h")
CUTLASS = ("cute/tensor.hpp", "cutlass/detail/sm100_blockscaled_layout.hpp")
TILES = (32, 64, 128)
# offsets, N, K: several tiles each way and more than an atom of tokens; more than 32 experts, some empty;
# four stages, K not a multiple of 64
CASES = [
    ([0, 150, 150, 167], 136, 96),
    (ragged_offsets(60, 40).tolist(), 8, 64),
    ([0, 5, 9], 24, 864),
]
# name: what the kernel says, what the mistake says
MISTAKES = {
    "scales of weights and tokens swapped": ("sf_a[i], sf_b)", "sf_b, sf_a[i])"),
    "halves of K swapped": ("b[2 * h], b[2 * h + 1]", "b[2 * h + 1], b[2 * h]"),
    "scales in another lane": ("quad + lane() % 2 * 8", "quad + lane() / 2 % 2 * 8"),
    "scales of another K": ("stage.tokens_sf + s * SfLayout", "stage.tokens_sf + (s ^ 1) * SfLayout"),
    "scales of the atom's first tokens": ("walk.token % SfLayout::kAtomRows", "0"),
    "scales of the first atom": ("(second ? walk.token : walk.row) / Sf", "(second ? walk.token : 0) / Sf"),
    "scales of the first expert": ("groups.tokens_sf[e]", "groups.tokens_sf[0]"),
    "size for cosize": ("* SfLayout{1, K / kBlock}.cosize()", "* (K / kBlock * 128)"),
    "padding of scales multiplied": ("columns - 4 * s == 2 ? 0xffff : ~0u", "~0u"),
    "written straight, read swizzled": ("(chunk() ^ row() % 8)", "chunk()"),
    "the neighbour's alpha": ("epilogue.alpha_of(e, column", "epilogue.alpha_of(e ? e - 1 : 0, column"),
    "the neighbour's token": ("room + place(mine, piece)", "room + place(mine ^ 1, piece)"),
    "row scales counted from the expert": ("epilogue.scale_of(begin + min", "epilogue.scale_of(min"),
    "weights eight rows off": ("(walk.row + row()) * static", "(max(walk.row - 8, 0) + row()) * static"),
    "tiles of 32 experts forgotten": ("before += __shfl_sync(~0u, through, 31);", ""),
    "sums not cleared": ("Part<T> part{};", "Part<T> part{1.0f};"),
    "bias rounded with the product": ("y + bias[i][h] : y", "fmaf(sum * alpha[i][h], scale, bias[i][h]) : y"),
    "a_scale before alpha": ("sum * alpha[i][h] * scale", "sum * scale * alpha[i][h]"),
    "columns past the last one stored": (" && n < N)", ")"),
    "a stage read before it is there": ("wait_for_copies<T::kStages - 2>", "wait_for_copies<T::kStages - 1>"),
    "no barrier before a stage is read and another filled": ("__syncthreads();  // everyone's", "//"),
}


def source(name: str, mistake: tuple[str, str] | None) -> str:
    """The headers and tests/cpp/sm120_product.cpp in a namespace of their own."""
    text = "\n".join((ROOT / "csrc/kernels" / header).read_text() for header in HEADERS)
    text = with_mistake(text, mistake)
    text = text[: text.index("template <int kTokens>\nvoid run_tile")] + "}\n"
    text += (ROOT / "tests/cpp/sm120_product.cpp").read_text()
    if mistake:  # one tile: the compiler's time
        text = re.sub(r"if \(sizes\[7\] == (64|128)\).*", "", text)
    text = re.sub(r"extern __shared__ .* memory\[\];", "uint8_t* memory = simt::shared_memory;", text)
    return in_namespace(name, text)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    headers = [f"<{path}>" for path in CUTLASS] + [f'"{path}"' for path in BEFORE]
    return build(tmp_path_factory.mktemp("cpp"), headers, source, MISTAKES)


def product(run, tile, a, w, offsets, bias=None, R=None, b_sf=None, backwards=False, ctas=3):
    """bf16 [R, N]"""
    (E, N), K, R = w.b.shape[:2], 2 * w.b.shape[2], len(a[0]) if R is None else R
    out = torch.full((R, N), float("nan"), dtype=torch.bfloat16)
    room = torch.full((R // 128 + min(E, R), formats.sf_cosize(1, K // 16)), 0x7F, dtype=torch.uint8)
    b_sf = w.b_sf if b_sf is None else b_sf
    at, kept = zip(*map(guarded, (*a, w.b, b_sf, w.alpha, bias, offsets, out, room)), strict=True)
    sizes = R, N, K, E, w.alpha.numel() // max(E, 1), a[2].numel(), backwards, tile, ctas
    run((ctypes.c_void_p * 10)(*at), (ctypes.c_int64 * 9)(*sizes))
    return kept[-2]


def check(run, tile, offsets, N, K, backwards=False):
    R, offsets = offsets[-1] + 3, torch.tensor(offsets, dtype=torch.int32)
    w, a = random_weights(len(offsets) - 1, N, K, 2), reference.quantize_rows(lively(R, K))
    got = product(run, tile, a, w, offsets, backwards=backwards)
    check_groups(got, reference.dequantize(*a[:2], torch.ones(())), w, offsets, a[2])


def check_rounding(run, tile):
    for a, w, offsets, bias, want in epilogue_steps():
        assert torch.equal(product(run, tile, a, w, offsets, bias, len(want)), want)


def check_padding(run, tile):
    """NaN where nothing lies changes nothing."""
    N, K = 136, 96
    w, a = random_weights(1, N, K), reference.quantize_rows(lively(9, K))
    offsets, sf = torch.tensor([0, 9], dtype=torch.int32), w.b_sf
    row, column = formats.sf_coord(torch.arange(sf.shape[1]), K // 16)
    sf.view(torch.uint8)[:, (row >= N) | (column >= K // 16)] = 0x7F
    assert_same_bits(product(run, tile, a, w, offsets, b_sf=sf), product(run, tile, a, w, offsets))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES, ids=["several tiles", "40 experts", "four stages"])
def test_a_grouped_product_is_within_the_bound(library, tile, case):
    for backwards in (False, True):
        check(library.run_as_it_is, tile, *case, backwards)


@pytest.mark.parametrize("tile", TILES)
def test_every_step_of_the_epilogue_is_rounded_in_the_contracts_order(library, tile):
    check_rounding(library.run_as_it_is, tile)


@pytest.mark.parametrize("tile", TILES)
def test_the_padding_of_the_scales_may_hold_anything(library, tile):
    check_padding(library.run_as_it_is, tile)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(library, mistake):
    run = run_with(library, MISTAKES, mistake)
    with pytest.raises(AssertionError):
        for case in CASES:
            check(run, 32, *case)
        check_padding(run, 32)
        check_rounding(run, 32)

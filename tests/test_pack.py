"""Weights in Hopper's own order: bit for bit the definition, exactly reversible, refused where nothing runs
them. What the kernels make of them: test_sm90*.py."""

import re

import pytest
import torch
from cases import lively, poison, random_packed, random_sf
from compare import REFUSED, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_moe import formats, ops, reference

# leading shape, N, K: least sizes; K % 128 = 32, 64, 96, 0; an odd number of blocks of 64 rows (half an atom)
SHAPES = [
    ((), 64, 32),
    ((1,), 64, 128),
    ((3,), 192, 224),
    ((2,), 128, 192),
    ((5,), 64, 544),
    ((2,), 320, 1056),
    ((0,), 64, 64),
]
EMPTY = torch.zeros(0, dtype=torch.float8_e4m3fn)


def public(lead, N, K):
    """Any codes, -0 among them, and all scales that may be: 0 .. 0x7e and NaN; b, linear scales."""
    sf = torch.randint(0, 0x80, (*lead, N, K // 16), dtype=torch.uint8)
    return random_packed(*lead, N, K // 2), sf.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestPack:
    def test_matches_the_reference_bit_for_bit(self, shape, device):
        b, sf = public(*shape)
        b_sf = reference.remap_sf(sf)
        want = reference.pack_sm90(b, b_sf)
        poison((want.numel(),), torch.uint8, device)
        assert_same_bits(ops.pack_sm90(b.to(device), b_sf.to(device)), want)

    def test_unpack_is_its_inverse_and_writes_zero_padding(self, shape, device):
        b, sf = public(*shape)
        b_sf = reference.remap_sf(sf)
        packed = ops.pack_sm90(b.to(device), b_sf.to(device))
        poison((b_sf.numel(),), torch.uint8, device)
        assert_same_bits(ops.unpack_sm90(packed, shape[2]), (b, b_sf))
        assert_same_bits(reference.unpack_sm90(packed.cpu(), shape[2]), (b, b_sf))

    def test_bytes_in_the_padding_of_the_scales_never_get_in(self, shape, device):
        _, N, K = shape
        b, sf = public(*shape)
        b_sf = reference.remap_sf(sf)
        row, column = formats.sf_coord(torch.arange(b_sf.shape[-1]), K // 16)
        poisoned = torch.where((row < N) & (column < K // 16), b_sf.view(torch.uint8), 0x7F)
        got = ops.pack_sm90(b.to(device), poisoned.view(torch.float8_e4m3fn).to(device))
        assert_same_bits(got, reference.pack_sm90(b, b_sf))

    def test_bytes_past_k_of_packed_weights_never_get_out(self, shape, device):
        b, sf = public(*shape)
        b_sf = reference.remap_sf(sf)
        columns = -(-shape[2] // 128) * 128
        wide = [torch.nn.functional.pad(t.view(torch.uint8), (0, w - t.shape[-1]), value=0x7F)
                for t, w in ((b, columns // 2), (sf, columns // 16))]  # fmt: skip
        packed = reference.pack_sm90(wide[0], reference.remap_sf(wide[1].view(torch.float8_e4m3fn)))
        assert_same_bits(ops.unpack_sm90(packed.to(device), shape[2]), (b, b_sf))


@given(
    lead=st.sampled_from([(), (1,), (3,), (2, 2)]), rows=st.integers(1, 5), blocks=st.integers(1, 20)
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_any_shape_comes_back_as_it_was(lead, rows, blocks):
    b, sf = public(lead, 64 * rows, 32 * blocks)
    b_sf = ops.remap_sf(sf)
    packed = ops.pack_sm90(b, b_sf)
    assert packed.shape == (*lead, rows * -(-blocks // 4) * 4608)
    assert_same_bits(ops.unpack_sm90(packed, 32 * blocks), (b, b_sf))


def bf16_of_code(code: int) -> int:
    """v * 2^-126 as BF16's bits: the sign in bit 15, exponent and mantissa in bits 8 .. 6."""
    return (code >> 3) << 15 | (code & 7) << 6


def rotated(word: int, by: int) -> int:
    return (word << by | word >> (32 - by)) & 0xFFFFFFFF


def decoded(first: int, second: int) -> list[tuple[int, int]]:
    """The eight pairs of a block as a thread takes them out: a rotation and a mask each."""
    mask, kept = 0x81C081C0, 0x06030603
    rest = first & kept | rotated(second, 2) & ~kept
    words = [[w, rotated(w, 4), rotated(w, 10), rotated(rest, by)] for w, by in ((first, 6), (second, 12))]
    return [(w & mask & 0xFFFF, (w & mask) >> 16) for of_word in words for w in of_word]


def test_every_thread_decodes_the_codes_it_owns():
    """packed.h, thread by thread, with nothing of ours: two experts, 2 x 2 blocks, K ends inside the last."""
    E, N, K = 2, 128, 224
    b, sf = public((E,), N, K)
    packed = ops.pack_sm90(b, ops.remap_sf(sf)).view(E, 2, 2, 4608).tolist()
    codes, scales = formats.unpack(b).tolist(), sf.view(torch.uint8).tolist()
    for e, i, j in ((e, i, j) for e in range(E) for i in range(2) for j in range(2)):
        block = bytes(packed[e][i][j])
        threads = ((u, w, lane, step) for u in range(2) for w in range(4) for lane in range(32)
                   for step in range(2))  # fmt: skip
        for place, (unit, warp, lane, step) in enumerate(threads):
            g, c = lane // 4, lane % 4
            row = 64 * i + 16 * warp + 8 * unit + g % 4 * 2 + g // 4
            k = 128 * j + 64 * step + 16 * c
            mine = codes[e][row][k : k + 16] if k < K else [0] * 16
            words = [int.from_bytes(block[8 * place + 4 * h :][:4], "little") for h in range(2)]
            want = [(bf16_of_code(mine[8 * h + n]), bf16_of_code(mine[8 * h + n + 4]))
                    for h in range(2) for n in range(4)]  # fmt: skip
            assert decoded(*words) == want, (e, i, j, unit, warp, lane, step)
            assert block[4096 + place] == (scales[e][row][k // 16] if k < K else 0)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda b, sf: ops.pack_sm90(b[:, :96].contiguous(), sf),
         "pack_sm90: N, the rows of `b`, must be a positive multiple of 64, got 96"),
        (lambda b, sf: ops.pack_sm90(b[..., :24].contiguous(), sf),
         "pack_sm90: K, twice the last dimension of `b`, must be a positive multiple of 32, got 48"),
        (lambda b, sf: ops.pack_sm90(b, sf[:, :512]),
         "pack_sm90: `b_sf` must be float8_e4m3fn [.., cosize(N, K/16)] = [2, 1024], got"),
        (lambda b, sf: ops.pack_sm90(b[:, ::2], sf),
         "pack_sm90: `b` must be contiguous, got"),
        (lambda b, sf: ops.unpack_sm90(ops.pack_sm90(b, sf), 48),
         "unpack_sm90: K of `packed`, packed for sm90, must be a positive multiple of 32, got 48"),
        (lambda b, sf: ops.unpack_sm90(ops.pack_sm90(b, sf)[:, 16:].contiguous(), 96),
         "unpack_sm90: the last dimension of `packed`, packed for sm90 with K = 96, must be a positive "
         "multiple of 4608, got 9200"),
        (lambda b, sf: ops.unpack_sm90(sf, 96), "unpack_sm90: `packed` must be uint8 [.., bytes] = [*], got"),
    ],
)  # fmt: skip
def test_wrong_operands_are_named(call, text, device):
    b, sf = public((2,), 128, 96)
    with pytest.raises(REFUSED, match=re.escape("nvfp4::" + text)):
        call(b.to(device), reference.remap_sf(sf).to(device))


def packed_experts(E, H, I, halves=2):
    """w13, its empty scales and alphas, the same of w2."""
    parts = []
    for N, K, alphas in ((halves * I, H, (E, halves)), (H, I, (E,))):
        b, sf = random_packed(E, N, K // 2), random_sf(E, N, K // 16)
        parts += [ops.pack_sm90(b, ops.remap_sf(sf)), EMPTY, torch.ones(alphas)]
    return parts


def test_no_experts_are_no_error(device):
    """A rank that holds none: every row is nobody's."""
    w13, none, alpha13, w2, _, alpha2 = (t.to(device) for t in packed_experts(0, 128, 96))
    x, factors = lively(5, 128, dtype=torch.bfloat16).to(device), torch.rand(5, 2, device=device)
    ids, offsets = (torch.zeros(n, dtype=torch.int32, device=device) for n in ((5, 2), (1,)))
    poison((5, 192), torch.bfloat16, device)
    assert not ops.grouped_gemm(x, None, None, w13, none, alpha13, offsets).any()
    for compute in ops.COMPUTES:
        assert not ops.moe(x, ids, factors, w13, none, alpha13, w2, none, alpha2, 0, compute).any()


def packed_calls() -> dict[str, tuple]:
    w13, none, alpha13, w2, _, alpha2 = packed_experts(3, 128, 96)
    x, ids = lively(5, 128, dtype=torch.bfloat16), torch.zeros(5, 2, dtype=torch.int32)
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    layer = (x, ids, torch.rand(5, 2), w13, none, alpha13, w2, none, alpha2, 0, "bf16", "silu", 1.0, 0.0)
    return {
        "grouped_gemm": (x, None, None, w13, none, alpha13, offsets),
        "grouped_gemm of codes": (*reference.quantize_rows(x), w13, none, alpha13, offsets),
        "linear": (x, w13[0], none, torch.ones(()), "nvfp4"),
        "moe": layer,
    }


@pytest.mark.parametrize("name", packed_calls())
class TestPackedOperands:
    def test_are_refused_on_the_cpu_in_one_sentence(self, name):
        op = name.split()[0]
        with pytest.raises(REFUSED, match=f"^nvfp4::{op}: `(b|w13)` is packed for sm90, got it on the CPU; "
                           "unpack_sm90 gives the layout back that runs everywhere"):  # fmt: skip
            getattr(ops, op)(*packed_calls()[name])

    def test_the_fake_takes_them_and_knows_the_output(self, name):
        args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in packed_calls()[name]]
        y = getattr(ops, name.split()[0])(*args)
        assert y.dtype == torch.bfloat16 and y.shape == (5, 128 if name == "moe" else 192)

    @pytest.mark.parametrize("how", ["longer", "shorter", "float8", "scales not float8", "strided", "K"])
    def test_spoiled_they_are_refused_by_kernel_and_fake_alike(self, name, how):
        args, errors = list(packed_calls()[name]), []
        at = {"linear": 1}.get(name, 3)
        b = args[at]
        if how == "K":
            args[0] = args[0][..., : args[0].shape[-1] - 8].contiguous()
            if "codes" in name:
                args[1] = args[1][:, :7].contiguous()
        elif how == "scales not float8":
            args[at + 1] = EMPTY.view(torch.uint8)
        else:
            args[at] = {
                "longer": torch.cat([b, b[..., :64]], -1),
                "shorter": b[..., :-16].contiguous(),
                "float8": b.view(torch.float8_e4m3fn),
                "strided": torch.stack([b, b], -1)[..., 0],
            }[how]
        op = name.split()[0]
        for device in ("cpu", "meta"):
            with pytest.raises(REFUSED) as error:
                spoiled = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
                if how == "strided" and device == "meta":
                    spoiled[at] = torch.stack([b.to("meta")] * 2, -1)[..., 0]
                getattr(ops, op)(*spoiled)
            errors.append(str(error.value).replace(" meta ", " cpu "))
        assert errors[0] == errors[1] and "on the CPU" not in errors[0]


def test_one_packed_matrix_of_two_is_refused(device):
    args = list(packed_calls()["moe"])
    args[3], args[4] = random_packed(3, 192, 64), reference.remap_sf(random_sf(3, 192, 8))
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(
        REFUSED, match="`w13` and `w2` must both be packed for sm90 or neither, got only `w2`"
    ):
        ops.moe(*args)


def test_matrices_of_different_widths_are_refused(device):
    args = list(packed_calls()["moe"])
    args[6] = packed_experts(3, 128, 160)[3]
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    want = (
        r"nvfp4::moe: `w2` must be uint8 packed for sm90, \[.., bytes\] = \[3, 9216\], got uint8 \[3, 18432\]"
    )
    with pytest.raises(REFUSED, match=want):
        ops.moe(*args)

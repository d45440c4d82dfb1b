"""grouped_gemm and linear: exact decode, float32 sums within the derived bound, a row's bits its own."""

import pytest
import torch
from cases import lively, poison, ragged_offsets, random_packed, random_sf, random_weights
from compare import REFUSED, assert_gemm, assert_same_bits

from nvfp4_moe import formats, ops, reference

# (R, N, K, E): tiny, ragged N and K (K % 32 = 16, more than one k-block), many empty experts, decode and
# prefill sizes
SHAPES = [
    (1, 1, 16, 1),
    (5, 7, 48, 3),
    (0, 8, 32, 2),
    (9, 130, 1040, 4),
    (3, 24, 64, 40),
    (70, 96, 2064, 2),
    (6, 8, 32, 0),
]


def run(a, w, offsets, device, bias=None):
    """a is bf16 [R, K] or (packed, sf, scale)."""
    operands = a if isinstance(a, tuple) else (a, None, None)
    args = (*operands, w.b, w.b_sf, w.alpha, offsets, bias)
    return ops.grouped_gemm(*(t if t is None else t.to(device) for t in args)).cpu()


def check_groups(got, a, w, offsets, scale=None, bias=None):
    N = w.b.shape[1]
    alpha = reference.gemm.spread_alpha(w.alpha, N)
    for e in range(len(w.b)):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        s = None if scale is None else scale.expand(len(a))[rows]
        assert_gemm(
            got[rows],
            a[rows],
            w.dequantized(e),
            alpha[e],
            s,
            None if bias is None else bias[e],
            f"expert {e}",
        )
    assert not got[int(offsets[-1]) :].view(torch.int16).any(), "rows of no expert are +0"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestGroupedGemm:
    @pytest.mark.parametrize("alphas", [1, 2])
    def test_bf16_activations_are_within_the_bound(self, shape, alphas, device):
        R, N, K, E = shape
        w, a = random_weights(E, N + N % alphas, K, alphas), lively(R, K, dtype=torch.bfloat16)
        offsets = ragged_offsets(R, E)
        poison((R, N), torch.bfloat16)
        check_groups(run(a, w, offsets, device), a, w, offsets)

    @pytest.mark.parametrize("scale_kind", ["row", "tensor"])
    def test_nvfp4_activations_are_decoded_exactly(self, shape, scale_kind, device):
        R, N, K, E = shape
        w, x = random_weights(E, N, K), lively(R, K)
        if scale_kind == "row":
            a = reference.quantize_rows(x)
        else:
            scale = reference.tensor_scale(x)
            a = (*reference.quantize(x, scale), scale)
        offsets = ragged_offsets(R, E)
        got = run(a, w, offsets, device)
        check_groups(got, reference.dequantize(*a[:2], torch.ones(())), w, offsets, a[2])

    def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(self, shape, device):
        R, N, K, E = shape
        w, a = random_weights(E, N, K), lively(R, K, dtype=torch.bfloat16)
        offsets = ragged_offsets(R, E)
        together = run(a, w, offsets, device)
        for r in range(0, int(offsets[-1]), 7):
            alone = run(a[r : r + 1], w, (offsets > r).int(), device)
            assert_same_bits(alone[0], together[r], f"row {r}")


def test_one_hot_activations_give_the_weights_back_bit_for_bit(device):
    N, K = 37, 144
    w = random_weights(2, N, K)
    sf = random_sf(2, N, K // 16)
    a = torch.eye(K).bfloat16().repeat(2, 1)
    ones = torch.ones(2)
    got = ops.grouped_gemm(
        *(
            t if t is None else t.to(device)
            for t in (
                a,
                None,
                None,
                w.b,
                reference.remap_sf(sf),
                ones,
                torch.tensor([0, K, 2 * K], dtype=torch.int32),
            )
        )
    ).cpu()
    for e in range(2):
        want = reference.dequantize(w.b[e], sf[e], torch.ones(()), torch.bfloat16)
        assert torch.equal(got[e * K : (e + 1) * K].T, want)


def test_every_code_times_every_scale_is_exact_through_the_gemm(device):
    sf = torch.arange(0x7F, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)  # [127, 1]
    b = formats.pack(torch.arange(16)).expand(127, 8).contiguous()
    got = ops.linear(
        torch.eye(16).bfloat16().to(device),
        b.to(device),
        ops.remap_sf(sf.to(device)),
        torch.ones((), device=device),
        "bf16",
    )
    want = formats.e2m1_decode(torch.arange(16))[:, None] * sf.float().T
    assert torch.equal(got.cpu().float(), want)


def test_nan_scales_turn_their_own_columns_and_rows_into_nan(device):
    w, a = random_weights(1, 24, 64), lively(5, 64, dtype=torch.bfloat16)
    w.sf.view(torch.uint8)[0, 3, 1] = 0x7F
    a[2, 9] = torch.nan
    got = run(a, w, torch.tensor([0, 5], dtype=torch.int32), device).isnan()
    want = torch.zeros(5, 24, dtype=torch.bool)
    want[:, 3], want[2] = True, True
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "offsets",
    [[0, 3, 2, 8], [-5, 2, 100, 3], [7, 7, 7, 7], [8, 5, 3, 0], [2**31 - 1, -(2**31), 0, 5]],
    ids=str,
)
def test_offsets_that_lie_never_leave_the_buffers(offsets, device):
    """Rows that nobody computes then may hold anything on a GPU, so nothing is read there; what comes next
    is right."""
    w, a = random_weights(3, 40, 64), lively(8, 64, dtype=torch.bfloat16)
    args = (a, None, None, w.b, w.b_sf, w.alpha, torch.tensor(offsets, dtype=torch.int32))
    got = ops.grouped_gemm(*(t if t is None else t.to(device) for t in args))
    assert got.shape == (8, 40) and (device == "cuda" or not got.isnan().any())
    honest = ragged_offsets(8, 3)
    check_groups(run(a, w, honest, device), a, w, honest)


def test_bias_is_added_in_float32_before_the_one_rounding(device):
    R, N, K, E = 12, 40, 96, 3
    w, a, bias = (random_weights(E, N, K, 2), reference.quantize_rows(lively(R, K)), torch.randn(E, N) * 0.1)
    offsets = ragged_offsets(R, E)
    got = run(a, w, offsets, device, bias)
    check_groups(got, reference.dequantize(*a[:2], torch.ones(())), w, offsets, a[2], bias)


@pytest.mark.parametrize("compute", ["nvfp4", "bf16"])
@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 5)], ids=str)
class TestLinear:
    def test_is_within_the_bound_with_an_alpha_for_each_row_of_the_weights(self, lead, compute, device):
        N, K = 50, 176
        w, x = (
            random_weights(1, N, K),
            lively(*lead, K, dtype=torch.bfloat16) if lead else torch.randn(K).bfloat16(),
        )
        alpha, bias = torch.rand(N) * 0.01 + 1e-3, torch.randn(N)
        args = (x, w.b[0], w.b_sf[0], alpha)
        got = ops.linear(*(t.to(device) for t in args), compute, bias.to(device)).cpu()
        assert got.shape == (*lead, N)
        rows, scale = x.reshape(-1, K), None
        if compute == "nvfp4":
            packed, sf, scale = reference.quantize_rows(rows)
            rows = reference.dequantize(packed, sf, torch.ones(()))
        assert_gemm(got.reshape(-1, N), rows, w.dequantized(0), alpha, scale, bias)


def test_one_alpha_and_equal_row_alphas_are_the_same_layer(device):
    w, x = random_weights(1, 24, 64), lively(3, 64, dtype=torch.bfloat16).to(device)
    b, sf, alpha = (t.to(device) for t in (w.b[0], w.b_sf[0], w.alpha[0]))
    assert_same_bits(
        ops.linear(x, b, sf, alpha, "nvfp4"), ops.linear(x, b, sf, alpha.expand(24), "nvfp4").cpu()
    )


def test_threads_do_not_change_a_bit():
    w, a = random_weights(4, 200, 1040), lively(50, 1040, dtype=torch.bfloat16)
    offsets, before = ragged_offsets(50, 4), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(a, w, offsets, "cpu")
        torch.set_num_threads(3)
        assert_same_bits(run(a, w, offsets, "cpu"), one)
    finally:
        torch.set_num_threads(before)


def test_gemm_plan_says_what_would_run():
    assert "cpu" in ops.gemm_plan(8, 4096, 4096, 8) or torch.cuda.is_available()
    with pytest.raises(REFUSED, match="gemm_plan: K must be a positive multiple of 16, got 20"):
        ops.gemm_plan(8, 4096, 20, 8)


def test_poisoned_random_bytes_never_crash(device):
    """Any bytes are weights: NaN and negative scales included."""
    sf = torch.randint(0, 256, (3, formats.sf_cosize(33, 5)), dtype=torch.uint8).view(torch.float8_e4m3fn)
    a, alpha = lively(10, 80, dtype=torch.bfloat16), torch.rand(3)
    args = (a, None, None, random_packed(3, 33, 40), sf, alpha, ragged_offsets(10, 3))
    got = ops.grouped_gemm(*(t if t is None else t.to(device) for t in args)).cpu()
    want = reference.grouped_gemm(*args)
    assert torch.equal(got.isnan(), want.isnan())

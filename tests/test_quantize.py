"""quantize, quantize_rows, dequantize, tensor_scale: bit for bit the reference, for every kind of value."""

import pytest
import torch
from cases import lively, poison, random_packed, random_sf
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nvfp4_moe import formats, ops, reference

SHAPES = [(1, 16), (7, 48), (2, 3, 160), (64,), (0, 32), (33, 4096)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def awkward(*shape, dtype=torch.float32):
    """Rows of zeros, of -0, with NaN, with infinities, huge, subnormal, and full of E2M1 ties."""
    x = lively(*shape)
    flat = x.view(-1, shape[-1])
    kinds = [
        lambda r: r * 0.0,
        lambda r: -torch.zeros_like(r),
        lambda r: r.index_fill(0, torch.tensor([3]), torch.nan),
        lambda r: r.index_fill(0, torch.tensor([5]), torch.inf),
        lambda r: r.index_fill(0, torch.tensor([0]), -torch.inf),
        lambda r: r * 2.0**120,
        lambda r: r * 2.0**-140,
        lambda r: torch.randint(-28, 29, r.shape) / 4.0,
        lambda r: torch.full_like(r, torch.nan),
        lambda r: torch.full_like(r, torch.inf),
        lambda r: r,
    ]
    for i in range(len(flat)):
        flat[i] = kinds[i % len(kinds)](flat[i])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestMatchesTheReferenceBitForBit:
    @pytest.mark.parametrize("make", [lively, awkward], ids=["lively", "awkward"])
    def test_quantize_rows(self, make, shape, dtype, device):
        x = make(*shape, dtype=dtype)
        poison(shape, dtype)
        assert_same_bits(ops.quantize_rows(x.to(device)), reference.quantize_rows(x))

    @pytest.mark.parametrize("make", [lively, awkward], ids=["lively", "awkward"])
    def test_tensor_scale_and_quantize(self, make, shape, dtype, device):
        x = make(*shape, dtype=dtype)
        scale = ops.tensor_scale(x.to(device))
        assert_same_bits(scale, reference.tensor_scale(x))
        assert_same_bits(ops.quantize(x.to(device), scale), reference.quantize(x, scale.cpu()))

    def test_dequantize(self, shape, dtype, device):
        packed, sf = (random_packed(*shape[:-1], shape[-1] // 2), random_sf(*shape[:-1], shape[-1] // 16))
        sf.view(torch.uint8).flatten()[:1] = 0x7F
        scale = torch.rand(shape[:-1]) * 2.0**-7
        got = ops.dequantize(packed.to(device), sf.to(device), scale.to(device), dtype)
        assert_same_bits(got, reference.dequantize(packed, sf, scale, dtype))


@given(
    x=arrays("f4", (3, 32), elements=st.floats(width=32)),
    scale=st.floats(min_value=0, max_value=2.0**100, width=32),
)
def test_quantize_matches_the_reference_on_any_value_and_scale(x, scale):
    x, scale = torch.from_numpy(x), torch.tensor(scale)
    assert_same_bits(ops.quantize(x, scale), reference.quantize(x, scale))
    assert_same_bits(ops.quantize_rows(x), reference.quantize_rows(x))


def test_quantize_broadcasts_its_scale(device):
    x = lively(4, 3, 32)
    for shape in ((), (1,), (3,), (4, 1), (1, 3), (4, 3)):
        scale = torch.rand(shape) * 0.01 + 1e-3
        assert_same_bits(
            ops.quantize(x.to(device), scale.to(device)), reference.quantize(x, scale), str(shape)
        )


@pytest.mark.parametrize(
    "scale", [torch.inf, -torch.inf, torch.nan, -torch.nan, -1.0, 0.0, 2.0**-149], ids=str
)
def test_odd_scales_of_the_callers_own_give_the_reference_bits(scale, device):
    x = awkward(11, 64)
    scale = torch.tensor(scale)
    assert_same_bits(ops.quantize(x.to(device), scale.to(device)), reference.quantize(x, scale))


def test_every_bf16_quotient_rounds_as_division_does(device):
    """Every mantissa of a block's maximum under every exponent of its scale, over every value of 16 octaves
    below."""
    amax = (1 + torch.arange(128) / 128).repeat_interleave(18)
    exponent = torch.arange(18).repeat(128)
    values = ((1 + torch.arange(128) / 128) * 2.0 ** -torch.arange(16.0)[:, None]).flatten()
    below = torch.cat([values, -values])[: 273 * 15].view(273, 15)
    x = torch.minimum(below.abs(), amax[:, None, None]) * below.sign()
    x = torch.cat([amax[:, None, None].expand(-1, 273, 1), x], -1).flatten(1)  # the maximum leads each block
    first = torch.zeros(len(x), 16)
    first[:, 0] = amax * 2.0**exponent  # fixes the row's scale, and with it the exponent of the other blocks'
    x = torch.cat([first, x], 1).bfloat16()
    assert_same_bits(ops.quantize_rows(x.to(device)), reference.quantize_rows(x))


def test_strided_activations_are_read_as_they_are(device):
    x = lively(32, 12, 3).to(device)[..., 1].T  # [12, 32], neither stride 1 nor packed
    assert_same_bits(ops.quantize_rows(x), reference.quantize_rows(x.cpu()))


def test_quantize_rows_gathers_and_clamps_rows_that_lie(device):
    x = lively(5, 64, dtype=torch.bfloat16)
    rows = torch.tensor([4, 0, 0, 2, -7, 99], dtype=torch.int32)
    got = ops.quantize_rows(x.to(device), rows.to(device))
    assert_same_bits(got, reference.quantize_rows(x[[4, 0, 0, 2, 0, 4]]))


def test_row_scales_are_powers_of_two_and_do_not_change_what_is_decoded(device):
    x = lively(64, 256, dtype=torch.bfloat16).to(device)
    packed, sf, scale = ops.quantize_rows(x)
    mantissa, _ = torch.frexp(scale)
    assert bool((mantissa == 0.5).all())
    # a coarser power of two moves the block scales' exponents and nothing else, while none leaves E4M3's
    # range
    wide = torch.where(sf.view(torch.uint8) >= 0x18, True, False).all(-1)
    packed2, sf2 = ops.quantize(x[wide], scale[wide] * 2)
    twice = ops.dequantize(packed2, sf2, scale[wide] * 2, torch.float32)
    assert_same_bits(twice, ops.dequantize(packed[wide], sf[wide], scale[wide], torch.float32))


def test_a_nan_turns_only_its_own_block_into_nan_and_an_infinity_saturates(device):
    x = lively(3, 64).to(device)
    clean = ops.dequantize(*ops.quantize_rows(x), torch.float32)
    x[1, 20], x[2, 7] = torch.nan, -torch.inf
    got = ops.dequantize(*ops.quantize_rows(x), torch.float32).cpu()
    assert bool(got[1, 16:32].isnan().all()) and not bool(got[1, 32:].isnan().any())
    assert torch.equal(got[0], clean[0].cpu())
    scale = ops.quantize_rows(x)[2]
    assert got[2, 7].item() == -6 * 448 * scale[2].item()


def test_all_zero_rows_have_scale_zero_and_keep_their_signs(device):
    x = torch.tensor([0.0, -0.0] * 8, device=device)[None]
    packed, sf, scale = ops.quantize_rows(x)
    assert scale.item() == 0 and sf.view(torch.uint8).item() == 0x01
    assert packed.cpu().unique().tolist() == [0x80]


def test_dequantize_is_exact_over_every_code_and_scale(device):
    sf = torch.arange(256, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    packed = formats.pack(torch.arange(16)).expand(256, 8).contiguous()
    for dtype in FLOATS:
        got = ops.dequantize(packed.to(device), sf.to(device), torch.ones((), device=device), dtype).cpu()
        want = formats.e2m1_decode(torch.arange(16)).double() * sf.double()
        assert torch.equal(got.double().nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("method, percent", [("amax", 9.51), ("four_over_six", 8.70), ("mse", 8.13)])
def test_weight_quantizers_have_the_known_error_on_gaussian_data(method, percent):
    from nvfp4_moe import Nvfp4Tensor

    w = torch.randn(
        512, 1024
    )  # 2048 x 2048 gives 9.510 / 8.698 / 8.125; half a million values are within 0.3 %
    error = (Nvfp4Tensor.quantize(w, method).dequantize() - w).norm() / w.norm() * 100
    assert abs(error - percent) < 0.03


def test_searching_quantizers_never_err_more_than_amax_in_any_block():
    from nvfp4_moe import Nvfp4Tensor

    w = lively(3, 32, 96)
    error = lambda q: (q.dequantize() - w).square().unflatten(-1, (-1, 16)).sum(-1)  # noqa: E731
    amax, mse = (error(Nvfp4Tensor.quantize(w, m)) for m in ("amax", "mse"))
    assert bool((mse <= amax * (1 + 1e-5)).all()) and float(mse.sum()) < float(amax.sum())


@pytest.mark.parametrize("kind", ["gaussian", "far apart", "few values", "sparse", "heavy tail"])
def test_mse_is_the_best_of_all_126_scales_though_it_tries_fewer(kind):
    from nvfp4_moe import Nvfp4Tensor

    w = torch.randn(32, 256)
    w = {
        "gaussian": w,
        "far apart": w * torch.exp2(torch.randint(-20, 1, (32, 16)).float()).repeat_interleave(16, -1),
        "few values": w.round(),
        "sparse": w * (torch.rand_like(w) < 0.1),
        "heavy tail": w**5,
    }[kind]
    alpha = w.abs().max() / formats.TENSOR_MAX
    blocks = w.unflatten(-1, (-1, 16))[..., None]  # [32, 16, 16, 1]
    steps = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * alpha

    def error(codes, step):  # exact but for float64's roundings
        return (formats.e2m1_decode(codes).double() * step - blocks).square().sum(-2)

    least = error(formats.e2m1_encode(blocks / steps), steps.double()).amin(-1)
    q = Nvfp4Tensor.quantize(w, "mse")
    codes = formats.unpack(q.packed).unflatten(-1, (-1, 16))[..., None]
    got = error(codes, (q.sf.float() * alpha).double()[..., None, None])[..., 0]
    # it compares in float32: a difference of two values near x is off by 2^-23 x, a sum of squares by 2^-20
    slack = 2 * 2.0**-23 * blocks.double().norm(dim=(-1, -2))
    assert (got.sqrt() <= least.sqrt() * (1 + 2.0**-20) + slack).all()

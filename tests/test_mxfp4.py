"""mxfp4_to_nvfp4: what survives the conversion, and how much is lost where it does not."""

import pytest
import torch
from cases import poison, random_packed
from compare import REFUSED, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_moe import formats, ops, reference

METHODS = ("best", "requantize", "verbatim_midpoint", "verbatim_search", "hybrid")
LOSSLESS = ("best", "verbatim_midpoint", "verbatim_search", "hybrid")  # up to a spread of 17
SHAPES = [(1, 32), (7, 96), (2, 3, 160), (3, 2, 5, 64), (0, 4, 32), (2, 0, 64), (33, 544)]
ONE, NAN = 0x38, 0x7F


def random_e8m0(N: int, K: int, kmin: int, spread: int) -> torch.Tensor:
    """[N, K/32] with both ends of kmin .. kmin + spread among them."""
    byte = torch.randint(kmin + 127, kmin + spread + 128, (N, K // 32))
    byte.view(-1)[:2] = torch.tensor([kmin + 127, kmin + spread + 127])
    return byte.flatten()[torch.randperm(byte.numel())].view(N, -1).to(torch.uint8)


def mxfp4(packed, e8m0):
    """The source's values, float64 [.., K]."""
    return values(packed) * per_value(formats.e8m0_decode(e8m0), 32)


def nvfp4(packed, sf, alpha):
    """The result's values, float64 [.., K]: exact, as the products have 30 bits."""
    return values(packed) * per_value(sf, 16) * alpha.double()


def values(packed):
    return formats.e2m1_decode(formats.unpack(packed)).double()


def per_value(scale, block):
    return scale.double().repeat_interleave(block, -1)


def convert(packed, e8m0, method, device="cpu"):
    return tuple(t.cpu() for t in ops.mxfp4_to_nvfp4(packed.to(device), e8m0.to(device), method))


def squared_error(packed, e8m0, method, device="cpu") -> float:
    got = nvfp4(*convert(packed, e8m0, method, device))
    return float((got - mxfp4(packed, e8m0)).square().sum())


def block_of(codes, sign: int = 0):
    """32 codes that cycle through `codes`, packed [16]."""
    return formats.pack(torch.tensor([codes[i % len(codes)] | sign for i in range(32)]))


def matrix(*blocks):
    """(packed [16], k) pairs -> one row."""
    packed = torch.cat([codes for codes, _ in blocks])[None]
    return packed, torch.tensor([[k + 127 for _, k in blocks]], dtype=torch.uint8)


def bytes_of(sf):
    return sf.view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize("method", METHODS)
class TestMatchesTheReferenceBitForBit:
    @pytest.mark.parametrize("spread", [3, 17, 18, 21, 45, 252], ids="spread {}".format)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_on_random_codes_and_exponents(self, shape, spread, method, device):
        *lead, K = shape
        packed = random_packed(*lead, K // 2)
        e8m0 = torch.randint(252 - spread, 253, (*lead, K // 32)).to(torch.uint8)
        poison(packed.shape, torch.uint8)
        want = reference.mxfp4_to_nvfp4(packed, e8m0, method)
        assert_same_bits(convert(packed, e8m0, method, device), want)

    def test_with_any_number_of_threads(self, method):
        packed, e8m0 = random_packed(512, 512), random_e8m0(512, 1024, -20, 21)
        before = torch.get_num_threads()
        results = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(convert(packed, e8m0, method))
        torch.set_num_threads(before)
        assert_same_bits(*results)

    @given(data=st.data())
    @settings(max_examples=40, deadline=None)
    def test_on_anything(self, method, data):
        N, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        near = data.draw(st.integers(0, 255))
        byte = st.one_of(st.integers(max(0, near - 20), near), st.integers(0, 255))

        def draw(each, n):
            drawn = data.draw(st.lists(each, min_size=n, max_size=n))
            return torch.tensor(drawn, dtype=torch.uint8).view(N, -1)

        packed, e8m0 = draw(st.integers(0, 255), N * blocks * 16), draw(byte, N * blocks)
        # any codes; zeros; up to 1.5; up to .5; 0, 2, 4 and no odd code
        packed[:, ::2] &= data.draw(st.sampled_from([0xFF, 0x88, 0xBB, 0x99, 0xCC]))
        want = reference.mxfp4_to_nvfp4(packed, e8m0, method)
        assert_same_bits(convert(packed, e8m0, method), want)


@pytest.mark.parametrize("method", LOSSLESS)
class TestKeepsEveryBit:
    @pytest.mark.parametrize("spread", range(18))
    def test_of_codes_whose_exponents_fit_the_window(self, spread, method, device):
        for kmin in (-127, -40, 125 - spread):
            packed, e8m0 = random_packed(8, 128), random_e8m0(8, 256, kmin, spread)
            got = convert(packed, e8m0, method, device)
            assert_same_bits(got[0], packed)
            assert torch.equal(nvfp4(*got), mxfp4(packed, e8m0))
            assert got[2] >= 2.0**-126, "alpha is a normal float32"

    def test_and_uses_all_18_powers_of_two_of_e4m3(self, method, device):
        got = convert(*matrix(*((block_of(range(8)), k) for k in range(-9, 9))), method, device)
        each = [0x01, 0x02, 0x04, *range(0x08, 0x79, 0x08)]
        assert bytes_of(got[1]) == [byte for byte in each for _ in range(2)] and got[2] == 1

    def test_of_the_sign_of_zeros(self, method, device):
        minus_zero = torch.full((16,), 0x88, dtype=torch.uint8)
        packed, e8m0 = matrix((block_of([8, 0, 9]), 0), (minus_zero, 40), (block_of([8, 12]), -17))
        assert_same_bits(convert(packed, e8m0, method, device)[0], packed)


@pytest.mark.parametrize("method", METHODS)
class TestOddBlocks:
    def test_a_zero_tensor_has_alpha_1_and_scales_1(self, method, device):
        packed = random_packed(4, 64) & 0x88
        e8m0 = torch.randint(0, 256, (4, 4)).to(torch.uint8)
        got = convert(packed, e8m0, method, device)
        assert_same_bits(got[0], packed)
        assert set(bytes_of(got[1])) == {ONE} and got[2] == 1

    @pytest.mark.parametrize("byte", [0, 1, 9, 127, 252])
    def test_one_nonzero_code_is_exact_wherever_it_stands(self, byte, method, device):
        packed = torch.zeros(2, 32, dtype=torch.uint8)
        packed[1, 27] = 0xF0
        e8m0 = torch.full((2, 2), byte, dtype=torch.uint8)
        got = convert(packed, e8m0, method, device)
        error = (nvfp4(*got) - mxfp4(packed, e8m0)).abs().max() / mxfp4(packed, e8m0).abs().max()
        # requantize: 6 / 2688 is no float32, and below 2^-126 it has as few as 10 bits
        assert error < 2.0**-9 if method == "requantize" else error == 0
        assert bytes_of(got[1])[:7] == [ONE] * 7, "halves of zeros"

    @pytest.mark.parametrize("stray", [0, 150, 254, 255])
    def test_the_exponent_of_a_zero_block_does_not_matter(self, stray, method, device):
        packed, e8m0 = random_packed(6, 64), random_e8m0(6, 128, -6, 19)
        packed[2, :16] &= 0x88
        e8m0[2, 0] = 127
        want = convert(packed, e8m0, method, device)
        e8m0[2, 0] = stray
        assert_same_bits(convert(packed, e8m0, method, device), want)

    @pytest.mark.parametrize("byte", [253, 254, 255])
    def test_a_block_beyond_float32_turns_nan_and_disturbs_no_other(self, byte, method, device):
        packed, e8m0 = random_packed(6, 64), random_e8m0(6, 128, -6, 19)
        packed[3, 16:24] = 0  # a half of zeros shares its block's fate
        packed[3, 24:32] = 0x71
        alone = packed.clone()
        alone[3, 16:32] = 0
        want = convert(alone, e8m0, method, device)
        e8m0[3, 1] = byte
        got = convert(packed, e8m0, method, device)
        assert bytes_of(got[1][3, 2:4]) == [NAN, NAN]
        assert_same_bits(got[0][3, 16:32], packed[3, 16:32])
        for g, w in zip(got, want, strict=True):
            if g.dim():
                S = 16 if g.dtype == torch.uint8 else 2  # bytes per block
                g.view(torch.uint8)[3, S : 2 * S] = w.view(torch.uint8)[3, S : 2 * S]
        assert_same_bits(got, want)


class TestBestIsNeverWorse:
    @pytest.mark.parametrize("spread", range(18, 41))
    def test_than_any_other_method(self, spread, device):
        for mask in (0xFF, 0xBB, 0xCC):  # any codes; none above 1.5; none of .5, 1.5, 3, 6
            packed, e8m0 = random_packed(16, 128) & mask, random_e8m0(16, 256, -20, spread)
            error = {m: squared_error(packed, e8m0, m, device) for m in METHODS}
            assert error["best"] == min(error.values()), error

    # the codes of a half block, and the k - m between which some E4M3 scale holds them exactly
    WINDOWS = (
        ([1, 2, 3, 4, 5, 6, 7], -9, 8),
        ([1, 2, 3, 4, 5], -9, 9),
        ([1, 2, 3], -9, 10),
        ([1], -9, 11),
        ([2, 4, 5, 6, 7], -10, 8),
        ([4, 6, 7], -11, 8),
        ([6], -12, 8),
    )

    @pytest.mark.parametrize("codes, low, high", WINDOWS, ids=str)
    def test_and_exact_as_far_as_the_codes_allow(self, codes, low, high, device):
        every, some = block_of([1, 2, 3, 4, 5, 6, 7], sign=8), block_of(codes)

        def error(fixed, k):  # the block of every code holds m in place from the other end
            return squared_error(*matrix((every, fixed), (some, k)), "best", device)

        assert error(8, low) == 0 < error(8, low - 1)
        assert error(-9, high) == 0 < error(-9, high + 1)

    def test_and_prefers_the_largest_power_of_two_among_equals(self, device):
        packed, e8m0 = matrix((block_of([1, 2, 3]), 40), (block_of([4, 5, 6]), -20))
        alpha = convert(packed, e8m0, "best", device)[2]  # the low block is lost under any
        assert alpha == 2.0 ** (40 - 8)

    def test_and_exact_at_spread_18_without_a_4_or_6_on_top_where_hybrid_is_not(self, device):
        low, top = random_packed(4, 512), formats.pack(torch.randint(1, 6, (4, 32)))
        packed = torch.cat([low, top], -1)
        e8m0 = torch.tensor([[127] * 32 + [145]] * 4, dtype=torch.uint8)
        # hybrid's smallest step is twice the unit of the low blocks: .5 turns 0 and 1.5 turns 2
        codes = formats.unpack(low) & 7
        lost = 0.25 * float(((codes == 1) | (codes == 3)).sum())
        assert squared_error(packed, e8m0, "hybrid", device) == lost > 0
        assert squared_error(packed, e8m0, "best", device) == 0

    def test_and_exact_at_spread_18_without_half_units_below_as_hybrid_is(self, device):
        codes = torch.tensor([0, 2, 4, 5, 6, 7, 10, 15])[torch.randint(0, 8, (4, 512))]
        packed = torch.cat([formats.pack(codes), random_packed(4, 16)], -1)
        e8m0 = torch.tensor([[127] * 16 + [145]] * 4, dtype=torch.uint8)
        assert [squared_error(packed, e8m0, m, device) for m in ("hybrid", "best")] == [0, 0]


class TestOneAlphaForEveryLeadingIndex:
    @pytest.mark.parametrize("method", METHODS)
    def test_experts_do_not_see_each_other(self, method, device):
        packed = random_packed(2, 3, 4, 64)
        e8m0 = torch.stack([random_e8m0(4, 128, -10 * i, 5 * i) for i in range(6)]).view(2, 3, 4, 4)
        together = convert(packed, e8m0, method, device)
        assert together[2].shape == (2, 3) and len(together[2].unique()) > 3
        for a, b in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
            alone = convert(packed[a, b], e8m0[a, b], method, device)
            assert alone[2].shape == ()
            assert_same_bits(tuple(t[a, b] for t in together), alone)

    def test_concatenated_rows_share_it(self, device):
        w1, w3 = random_packed(4, 64), random_packed(4, 64)
        e1, e3 = random_e8m0(4, 128, -20, 5), random_e8m0(4, 128, -9, 5)
        joint = convert(torch.cat([w1, w3]), torch.cat([e1, e3]), "best", device)
        assert joint[2] == 2.0 ** (-4 - 8)
        assert torch.equal(nvfp4(*joint), mxfp4(torch.cat([w1, w3]), torch.cat([e1, e3])))

    def test_float8_e8m0fnu_is_read_as_bytes(self, device):
        packed, e8m0 = random_packed(4, 64), random_e8m0(4, 128, -6, 19)
        want = convert(packed, e8m0, "best", device)
        assert_same_bits(convert(packed, e8m0.view(torch.float8_e8m0fnu), "best", device), want)


def test_seed_regression_mxfp4_is_lossless_to_spread_17(device):
    """Keeping the codes loses nothing; requantizing by amax does, at any spread, 0 included."""
    for spread in (0, 6, 17):
        packed, e8m0 = random_packed(16, 256), random_e8m0(16, 512, -12, spread)
        power = float(mxfp4(packed, e8m0).square().sum())
        for method in LOSSLESS:
            assert squared_error(packed, e8m0, method, device) == 0
        assert squared_error(packed, e8m0, "requantize", device) > 1e-4 * power, "the data can tell"


def zeros(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


class TestRejects:
    @pytest.mark.parametrize(
        "packed, e8m0, operand",
        [
            pytest.param(zeros(2, 24), zeros(2, 1), "packed", id="K = 48"),
            pytest.param(zeros(2, 0), zeros(2, 0), "packed", id="K = 0"),
            pytest.param(zeros(2, 32, dtype=torch.int8), zeros(2, 2), "packed", id="int8 codes"),
            pytest.param(zeros(32), zeros(2), "packed", id="one dimension"),
            pytest.param(zeros(2, 32), zeros(2, 2, dtype=torch.float), "e8m0", id="float e8m0"),
            pytest.param(zeros(2, 32), zeros(2, 4), "e8m0", id="a scale for 16 codes"),
            pytest.param(zeros(2, 2, 32), zeros(2, 2), "e8m0", id="e8m0 without experts"),
        ],
    )
    def test_an_operand_of_another_kind(self, packed, e8m0, operand, device):
        with pytest.raises(REFUSED, match=f"mxfp4_to_nvfp4.*{operand}"):
            convert(packed, e8m0, "best", device)

    def test_a_method_it_does_not_know(self, device):
        with pytest.raises(REFUSED, match=r"mxfp4_to_nvfp4.*method.*best.*got fastest"):
            convert(zeros(2, 16), zeros(2, 1), "fastest", device)

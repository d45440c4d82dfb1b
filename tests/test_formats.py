"""Number formats and the scale-factor layout, exhaustively."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_moe import formats, reference

E4M3_BYTES = torch.arange(256, dtype=torch.uint8)


def e4m3_by_definition(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


class TestE2m1:
    def test_decodes_every_code(self):
        want = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        got = formats.e2m1_decode(torch.arange(16))
        assert got.tolist() == want + [-v for v in want]
        assert torch.signbit(got[8]), "code 8 is -0"

    def test_rounds_to_nearest_with_ties_to_the_even_code(self):
        values = torch.tensor(formats.E2M1)
        for i in range(7):
            middle = (values[i] + values[i + 1]) / 2
            below, above = (torch.nextafter(middle, torch.tensor(t)) for t in (0.0, 10.0))
            codes = formats.e2m1_encode(torch.stack([below, middle, above])).tolist()
            assert codes == [i, i if i % 2 == 0 else i + 1, i + 1]

    def test_saturates_and_keeps_the_sign(self):
        x = torch.tensor([6.0, 7.0, 1e30, torch.inf, -torch.inf, -0.0, 0.0, -0.1])
        assert formats.e2m1_encode(x).tolist() == [7, 7, 7, 7, 15, 8, 0, 8]

    def test_packs_the_even_value_low(self):
        golden = bytes.fromhex("1032547698badcfe")  # formats in the wild agree on this order
        packed = torch.frombuffer(bytearray(golden), dtype=torch.uint8)
        assert formats.unpack(packed).tolist() == list(range(16))
        assert torch.equal(formats.pack(torch.arange(16)), packed)


class TestE4m3:
    def test_torch_decodes_every_byte_as_the_definition(self):
        got = E4M3_BYTES.view(torch.float8_e4m3fn).float()
        want = torch.tensor([e4m3_by_definition(b) for b in range(256)])
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got[~got.isnan()], want[~want.isnan()])

    def test_rounds_every_boundary_to_nearest_even(self):
        values = torch.tensor([e4m3_by_definition(b) for b in range(0x7F)], dtype=torch.float64)
        middle = ((values[1:] + values[:-1]) / 2).float()  # exact: one bit more than E4M3
        below, above = (torch.nextafter(middle, torch.zeros(())), torch.nextafter(middle, torch.tensor(1e9)))
        byte = torch.arange(0x7E)
        encode = lambda x: formats.e4m3_encode(x).view(torch.uint8).long()  # noqa: E731
        assert torch.equal(encode(below), byte)
        assert torch.equal(encode(middle), byte + byte % 2)
        assert torch.equal(encode(above), byte + 1)

    def test_saturates_where_torch_before_2_12_gave_nan(self):
        x = torch.tensor([448.0, 465.0, 1e30, torch.inf, -torch.inf])
        assert formats.e4m3_encode(x).float().tolist() == [448, 448, 448, 448, -448]

    def test_holds_exactly_eighteen_powers_of_two(self):
        finite = [e4m3_by_definition(b) for b in range(1, 0x7F)]
        exponents = {k for k in range(-20, 20) if 2.0**k in finite}
        assert exponents == set(range(-9, 9))


def test_every_product_of_code_and_scale_is_exact_in_bf16_and_fp16_range():
    sf = E4M3_BYTES[:0x7F].view(torch.float8_e4m3fn)
    products = formats.e2m1_decode(torch.arange(16))[:, None].double() * sf.double()[None]
    assert torch.equal(products.bfloat16().double(), products)
    assert torch.equal(products.half().double(), products)


def test_e8m0_is_a_power_of_two_with_byte_0_not_zero_and_255_nan():
    got = formats.e8m0_decode(torch.arange(256, dtype=torch.uint8))
    assert got[255].isnan() and got[0] == 2.0**-127
    assert torch.equal(got[:255].double(), 2.0 ** (torch.arange(255).double() - 127))


class TestSfLayout:
    @given(rows=st.integers(1, 700), cols=st.integers(1, 40))
    def test_coordinates_and_offsets_are_inverse_and_fill_cosize(self, rows, cols):
        byte = torch.arange(formats.sf_cosize(rows, cols))
        row, col = formats.sf_coord(byte, cols)
        assert torch.equal(formats.sf_offset(row, col, cols), byte)
        assert int(((row < rows) & (col < cols)).sum()) == rows * cols

    def test_cosize_counts_whole_atoms(self):
        assert [formats.sf_cosize(*s) for s in ((0, 5), (1, 1), (128, 4), (129, 4), (128, 5))] == [
            0,
            512,
            512,
            1024,
            1024,
        ]

    @pytest.mark.parametrize(
        "rows, cols", [(1, 1), (128, 4), (129, 5), (130, 448), (300, 12), (384, 7), (1000, 3)], ids=str
    )
    @pytest.mark.parametrize("operand", ["sfa", "sfb"])
    def test_is_cutlass_own_layout(self, operand, rows, cols):
        cute = pytest.importorskip("nvfp4_moe._cute", reason="built only where nvcc and CUTLASS headers are")
        theirs = getattr(cute, operand)(rows, 16 * cols)
        assert theirs["cosize"] == formats.sf_cosize(rows, cols)
        row, col = torch.arange(rows)[:, None], torch.arange(cols)[None]
        assert theirs["offsets"] == formats.sf_offset(row, col, cols).flatten().tolist()


class TestGoldenVectors:
    VALUES = (0, 0.1, -0.2, 0.3, -0.4, 0.5, 0.75, -1, 1.25, 1.5, -1.75, 2, 2.5, -3, 5, -7)

    def test_quantize_gives_modelopts_bytes(self, device):
        x = torch.tensor(self.VALUES, device=device)
        scale = torch.ops.nvfp4.tensor_scale(x)
        packed, sf = torch.ops.nvfp4.quantize(x, scale)
        assert scale.item() == torch.tensor(7.0).div(2688).item()
        assert bytes(packed.tolist()).hex() == "00 18 19 a1 32 3b d4 f6".replace(" ", "")
        assert sf.view(torch.uint8).item() == 0x7E

    def test_dequantize_gives_the_values_back(self, device):
        packed = torch.frombuffer(bytearray.fromhex("001819a1323bd4f6"), dtype=torch.uint8).to(device)
        sf = torch.tensor([0x7E], dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        got = torch.ops.nvfp4.dequantize(packed, sf, torch.tensor(7 / 2688, device=device), torch.float32)
        want = [
            0,
            0,
            -0.0,
            7 / 12,
            -7 / 12,
            7 / 12,
            7 / 12,
            -7 / 6,
            7 / 6,
            1.75,
            -1.75,
            1.75,
            7 / 3,
            -3.5,
            14 / 3,
            -7,
        ]
        torch.testing.assert_close(got.cpu(), torch.tensor(want), rtol=2e-7, atol=0)
        assert torch.signbit(got[2])


def test_reference_exp_is_within_2_3_ulp_and_has_ends():
    x = torch.cat([torch.linspace(-86.6, 86.6, 200001), torch.randn(100000)])
    got, want = reference.numbers.exp(x).double(), torch.exp(x.double())
    ulp = torch.ldexp(torch.ones_like(want), torch.frexp(want).exponent - 24)
    assert ((got - want).abs() / ulp).max() <= 2.3
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 86.7, -86.7, torch.nan])
    assert reference.numbers.exp(ends).nan_to_num(-1).tolist() == [
        1,
        1,
        torch.finfo().max,
        0,
        torch.finfo().max,
        0,
        -1,
    ]


class TestReferenceFma:
    def test_rounds_once_where_float64_would_round_twice(self):
        one, tiny = torch.ones(1), torch.tensor([2.0**-60])
        half = (
            torch.tensor([1 + 2.0**-12]),
            torch.tensor([2.0**-13]),
        )  # a product a quarter ulp above a tie, or not
        cases = [(one, tiny, torch.tensor([1 + 2.0**-23])), (*half, one), (half[0], half[0], -one)]
        for a, b, c in cases:
            exact = Fraction(a.item()) * Fraction(b.item()) + Fraction(c.item())
            assert reference.numbers.fma(a, b, c).item() == nearest_float32(exact)

    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
    def test_is_the_correctly_rounded_sum(self, abc):
        a, b, c = abc
        got = reference.numbers.fma(torch.tensor([a]), torch.tensor([b]), torch.tensor([c])).item()
        assert got == nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))


def nearest_float32(x) -> float:
    """The float32 nearest to a Fraction, ties to even: by integer division."""
    if x == 0:
        return 0.0
    sign, x = (-1.0, -x) if x < 0 else (1.0, x)
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= x < 2**exponent if exponent >= 0 else x * 2**-exponent < 1
    unit = max(exponent, -126) - 23
    scaled = x / 2**unit if unit >= 0 else x * 2**-unit
    whole = round(scaled)  # Fraction rounds half to even
    value = float(whole) * 2.0**unit
    return sign * (value if value < 2.0**128 else float("inf"))

"""remap_sf and unmap_sf: inverse to each other, every byte written, padding zero."""

import pytest
import torch
from cases import lively, poison, ragged_offsets, random_sf
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_moe import formats, ops, reference
from nvfp4_moe.reference.quantize import group_sf

SHAPES = [(128, 4), (1, 1), (3, 130, 5), (2, 300, 448), (2, 2, 129, 3), (0, 5), (4, 0), (0, 128, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestRemapSf:
    def test_matches_reference_bit_for_bit(self, shape, device):
        sf = random_sf(*shape)
        poison((formats.sf_cosize(*shape[-2:]) * 8,), torch.uint8)
        assert_same_bits(ops.remap_sf(sf.to(device)), reference.remap_sf(sf))

    def test_unmap_is_its_inverse(self, shape, device):
        sf = random_sf(*shape).to(device)
        assert_same_bits(ops.unmap_sf(ops.remap_sf(sf), *shape[-2:]), sf.cpu())


@given(rows=st.integers(1, 400), cols=st.integers(1, 30))
def test_every_byte_is_a_scale_or_zero_padding(rows, cols):
    sf = random_sf(rows, cols)
    interleaved = ops.remap_sf(sf).view(torch.uint8)
    row, col = formats.sf_coord(torch.arange(interleaved.numel()), cols)
    inside = (row < rows) & (col < cols)
    assert torch.equal(interleaved[inside], sf.view(torch.uint8)[row[inside], col[inside]])
    assert not interleaved[~inside].any()


def test_nan_bytes_travel_unchanged(device):
    sf = torch.tensor([[0x7F, 0xFF, 0x80]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert_same_bits(ops.unmap_sf(ops.remap_sf(sf.to(device)), 1, 3).view(torch.uint8), sf.view(torch.uint8))


class TestGroupedActivationScales:
    """Row scales written straight into each expert's own interleaved part, as Blackwell's grouped GEMM reads
    them."""

    @pytest.mark.parametrize(
        "R, K, E", [(1, 16, 1), (300, 80, 5), (700, 96, 4), (9, 64, 40), (0, 32, 3)], ids=str
    )
    def test_every_scale_is_in_its_place_and_every_other_byte_zero(self, R, K, E, device):
        x, offsets = lively(R, K, dtype=torch.bfloat16), ragged_offsets(R, E)
        packed, sf, scale = reference.quantize_rows(x)
        want = packed, group_sf(sf, offsets), scale
        poison((want[1].numel() * 8,), torch.uint8)
        got = torch.ops.nvfp4_internal.quantize_rows_grouped(x.to(device), None, offsets.to(device))
        assert_same_bits(got, want)

    @pytest.mark.parametrize("act", ops.ACTS)
    def test_the_same_after_the_activation(self, act, device):
        x, offsets = (
            lively(260, 192, dtype=torch.bfloat16),
            torch.tensor([0, 1, 1, 130, 259], dtype=torch.int32),
        )
        packed, sf, scale = reference.swiglu_quantize(x, act, 1.702, 7.0)
        want = packed, group_sf(sf, offsets), scale
        got = torch.ops.nvfp4_internal.swiglu_quantize_grouped(
            x.to(device), act, 1.702, 7.0, offsets.to(device)
        )
        assert_same_bits(got, want)

    @pytest.mark.parametrize("offsets", [[0, 300, 5, 9], [-7, 2**31 - 1, 0, 0], [9, 9, 9, 9]], ids=str)
    def test_offsets_that_lie_never_leave_the_buffer(self, offsets, device):
        x, lies = lively(10, 64, dtype=torch.bfloat16), torch.tensor(offsets, dtype=torch.int32)
        packed, _, scale = torch.ops.nvfp4_internal.quantize_rows_grouped(x.to(device), None, lies.to(device))
        assert_same_bits((packed, scale), reference.quantize_rows(x)[::2])

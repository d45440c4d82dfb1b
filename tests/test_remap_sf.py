"""remap_sf and unmap_sf: inverse to each other, every byte written, padding zero."""

import pytest
import torch
from cases import poison, random_sf
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_moe import formats, ops, reference

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

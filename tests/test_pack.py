"""Weights in Hopper's own order: bit for bit the definition, exactly reversible, refused where nothing runs
them. What the kernels make of them: test_sm90*.py."""

import pytest
import torch
from cases import poison, random_packed
from compare import REFUSED, assert_same_bits
from conftest import missing_hopper
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
        lead, N, K = shape
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

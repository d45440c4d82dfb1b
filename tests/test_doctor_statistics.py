"""The doctor's numbers, on tensors: against slow definitions, and against measurements of known data."""

import pytest
import torch
from checkpoint_weights import mxfp4

from nvfp4_moe import Nvfp4Tensor, formats, reference
from nvfp4_moe.diagnostics import histograms, statistics


def gaussian(sigma=1.0, amax_factor=1.0, size=2048):
    w = torch.randn(size, size) * sigma
    alpha = w.abs().max() / 2688 * amax_factor
    packed, sf = reference.quantize(w, alpha)
    return packed, sf.view(torch.uint8), float(alpha)


@pytest.mark.parametrize("N, blocks, group", [(1, 1, 16), (3, 5, 16), (130, 7, 32), (33, 200, 16)])
def test_the_table_counts_every_block_once(N, blocks, group, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 1000)  # several chunks
    packed = torch.randint(0, 256, (N, blocks * group // 2), dtype=torch.uint8)
    packed[0, : group // 2] = 0x80  # a block of zeros
    scales = torch.randint(0, 256, (N, blocks), dtype=torch.uint8)
    table = statistics.block_table(packed, scales)
    codes = formats.unpack(packed)
    largest = (codes & 7).unflatten(-1, (blocks, group)).amax(-1)
    for byte in scales.unique().tolist():
        want = torch.bincount(largest[scales == byte].long(), minlength=8)
        assert torch.equal(table.counts[byte], want)
    assert table.blocks == N * blocks and table.counts[:, 0].sum() >= 1
    assert torch.equal(table.codes, torch.bincount(codes.flatten().long(), minlength=16))


def test_the_first_block_is_found_in_any_chunk(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 64)
    packed, scales = torch.zeros(50, 64, dtype=torch.uint8), torch.zeros(50, 8, dtype=torch.uint8)
    packed[41, 30], scales[41, 3], scales[44, 0] = 0x10, 7, 7
    assert statistics.first_block(packed, scales, lambda s, c: s == 7) == [41, 3]
    assert statistics.first_block(packed, scales, lambda s, c: (s == 7) & (c == 0)) == [44, 0]
    assert statistics.first_block(packed, scales, lambda s, c: s == 9) is None


@pytest.mark.parametrize("factor, share", [(1 / 1.25, 1.45e-3), (1 / 1.5, 1.78e-2)])
def test_an_amax_too_small_shows_as_saturated_scales(factor, share):
    """Measured on 2048 x 2048 Gaussians: 2 blocks of 262144 with the right amax, these shares with less. The
    tail decides: one sample's share is within a factor of 3."""
    packed, scales, _ = gaussian(amax_factor=factor)
    count = int(statistics.block_table(packed, scales).counts[statistics.SATURATED, statistics.SIX])
    assert share / 3 < count / scales.numel() < share * 3
    packed, scales, _ = gaussian()
    assert int(statistics.block_table(packed, scales).counts[statistics.SATURATED, statistics.SIX]) <= 8


@pytest.mark.parametrize(
    "sigma, rms", [(5e-3, 0.280), (0.02, 0.082), (0.05, 0.033), (1.0, 0.033), (100, 0.025)]
)
def test_folding_loses_what_was_measured(sigma, rms):
    packed, scales, alpha = gaussian(sigma, size=1024)
    loss = statistics.folding(statistics.block_table(packed, scales), alpha)
    assert loss.rms == pytest.approx(rms, rel=0.25)  # as its amax falls


def test_folding_small_weights_zeroes_them_and_large_ones_saturates():
    packed, scales, alpha = gaussian(1e-3, size=512)
    loss = statistics.folding(statistics.block_table(packed, scales), alpha)
    assert (loss.rms, loss.zeroed, loss.clamped) == (1.0, 1.0, 0.0)
    packed, scales, alpha = gaussian(1000, size=512)
    assert statistics.folding(statistics.block_table(packed, scales), alpha).clamped > 0.05


def test_a_power_of_two_folds_without_loss():
    packed, scales, _ = gaussian(size=256)
    loss = statistics.folding(statistics.block_table(packed, scales), 0.5)
    assert loss.zeroed == loss.clamped == 0 and loss.rms < 1e-3  # subnormal scales may round


def test_the_sampled_size_of_weights():
    packed, scales, alpha = gaussian(0.02, size=512)
    assert statistics.sampled_std(packed, scales) * alpha == pytest.approx(0.02, rel=0.15)


def test_exponents_ignore_blocks_of_zeros_and_nan():
    packed = torch.full((1, 64), 0x22, dtype=torch.uint8)
    scales = torch.tensor([[100, 110, 200, 255]], dtype=torch.uint8)
    packed[0, 32:48] = 0x08  # -0 and 0
    table = statistics.block_table(packed, scales)
    found = statistics.exponents(table)
    assert (found.low, found.high, found.spread) == (100 - 127, 110 - 127, 10)
    assert statistics.exponents(statistics.block_table(packed & 0x88, scales)) is None
    assert found.union(statistics.Exponents(-40, -20)) == statistics.Exponents(-40, -17)


def test_blocks_out_of_range_and_their_loss():
    """18 below the top a Gaussian block loses 15.3 % of its root mean square."""
    packed, _, _ = mxfp4(torch.randn(4096, 32))
    e8m0 = torch.full((4096, 1), 100, dtype=torch.uint8)
    packed[0], e8m0[0] = 0x77, 118
    count, loss = statistics.out_of_range(statistics.block_table(packed, e8m0), 118 - 127)
    assert count == 4095
    out, sf, alpha = reference.mxfp4_to_nvfp4(packed, e8m0, "hybrid")
    want = formats.e2m1_decode(formats.unpack(packed[1:])) * 2.0 ** (100 - 127)
    got = Nvfp4Tensor(out, sf, alpha).dequantize()[1:]
    assert loss == pytest.approx(float((got - want).norm() / want.norm()), rel=0.1)


def test_every_power_of_two_scale_is_known():
    assert statistics.E4M3[statistics.POWERS].tolist() == [2.0**k for k in range(-9, 9)]


def test_histograms_count_everything():
    seen = histograms.Distributions()
    packed, scales, alpha = gaussian(0.02, size=256)
    table = statistics.block_table(packed, scales)
    seen.nvfp4(table, [alpha, float("nan")], [statistics.folding(table, alpha)])
    seen.mxfp4(table, statistics.Exponents(-10, -3))
    seen.ratios = [1.0, 1.0, 0.1, 8.0]
    drawn = {h.title: h for h in seen.histograms()}
    assert len(drawn) == 7
    for histogram in drawn.values():
        assert len(histogram.edges) == len(histogram.counts) + 1
        assert list(histogram.edges) == sorted(histogram.edges)
    scales_drawn = drawn["Block scales (E4M3)"]
    assert sum(scales_drawn.counts) == table.blocks and scales_drawn.edges[-1] == 9 > scales_drawn.edges[-2]
    ratios = drawn["Up's global scale over gate's"]
    assert sum(ratios.counts) == 4 and ratios.counts[0] == 1 and ratios.note == "2 of 4 pairs are equal"
    spread = drawn["MXFP4 exponent spread"]
    assert spread.counts[7] == 1 and spread.edges[7] == 6.5
    assert sum(drawn["Codes: 0 .5 1 1.5 2 3 4 6"].counts) == 2 * packed.numel() * 2  # counted twice above
    assert histograms.Distributions().histograms() == []

"""The four mistakes this project started from, by name. Each test first shows that the property holds here,
then plants the mistake and shows that the same check turns red. (The fourth, MXFP4 conversion, is in
test_mxfp4.py.)"""

import pytest
import torch
from cases import random_sf
from compare import relative_rms

from nvfp4_moe import Nvfp4Tensor, formats, ops, reference
from nvfp4_moe.reference.quantize import products


def largest_loss(got, want):
    """The largest relative error of a nonzero value."""
    nonzero = want != 0
    return float(((got - want).abs() / want.abs())[nonzero].max())


class TestScaleFolding:
    """Seed 1: global scales folded into the E4M3 block scales lose up to 25-33 % a value."""

    def weights(self):
        w = Nvfp4Tensor.quantize(torch.randn(256, 512) * 0.02)  # an ordinary layer: alpha 4e-5
        exact = products(w.packed, w.sf).double() * w.alpha.double()
        return w, exact

    def test_alpha_apart_costs_one_float32_rounding(self):
        w, exact = self.weights()
        assert largest_loss(w.dequantize().double(), exact) <= 2.0**-24

    def test_folding_turns_it_red(self):
        w, exact = self.weights()
        folded_sf = formats.e4m3_encode(w.sf.float() * w.alpha)
        folded = products(w.packed, folded_sf).double()
        assert 0.25 <= largest_loss(folded, exact) <= 1.0
        assert relative_rms(folded, exact) > 0.05

    def test_the_gemm_never_folds_gate_and_up_into_one_scale(self, device):
        alphas = torch.tensor([[3e-5, 7.1e-5]])  # not a power of two apart
        w = Nvfp4Tensor.quantize(torch.randn(1, 64, 64))
        args = (
            torch.eye(64).bfloat16(),
            None,
            None,
            w.packed,
            ops.remap_sf(w.sf),
            alphas,
            torch.tensor([0, 64], dtype=torch.int32),
        )
        got = ops.grouped_gemm(*(t if t is None else t.to(device) for t in args)).cpu()
        exact = products(w.packed[0], w.sf[0])
        want = (exact * alphas[0].repeat_interleave(32)[:, None]).bfloat16().T
        assert torch.equal(got, want)


def remap_over_size(sf):
    """The mistake: a walk over the size = rows * cols logical elements; the rest of the buffer stays zero."""
    rows, cols = sf.shape
    out = torch.zeros(formats.sf_cosize(rows, cols), dtype=torch.uint8)
    out[: rows * cols] = sf.view(torch.uint8).flatten()
    return out.view(torch.float8_e4m3fn)


class TestSizeForCosize:
    """Seed 2: the scale-factor remap walked size, not cosize. Uniform data hid it, real data gave cosine
    0."""

    def cosine(self, remap, sf, device="cpu"):
        N, K = sf.shape[0], 16 * sf.shape[1]
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
        x = torch.randn(8, K).bfloat16()
        got = ops.linear(
            x.to(device), codes.to(device), remap(sf).to(device), torch.ones((), device=device), "bf16"
        )
        want = x.double() @ reference.dequantize(codes, sf, torch.ones(())).double().T
        return float(
            torch.nn.functional.cosine_similarity(got.cpu().double().flatten(), want.flatten(), dim=0)
        )

    def data(self):
        uniform = torch.full((128, 4), 1.0).to(torch.float8_e4m3fn)  # whole atoms, one scale everywhere
        return {"uniform": uniform, "real": random_sf(128, 4), "ragged": random_sf(130, 5)}

    def test_every_scale_arrives(self, device):
        for name, sf in self.data().items():
            assert self.cosine(ops.remap_sf, sf, device) > 0.9999, name

    def test_walking_size_turns_it_red_on_real_data_and_only_there(self):
        data = self.data()
        assert self.cosine(remap_over_size, data["uniform"]) > 0.9999, "uniform data cannot tell"
        assert self.cosine(remap_over_size, data["real"]) < 0.9
        assert self.cosine(remap_over_size, data["ragged"]) < 0.5


class TestStaticActivationScale:
    """Seed 3: a checkpoint's input_scale where the runtime amax belongs shrinks activations, layer after
    layer."""

    def shrink(self, x, scale):
        got = ops.dequantize(*ops.quantize(x, scale), scale, torch.float32)
        return float(got.abs().mean() / x.abs().mean())

    @pytest.mark.parametrize(
        "calibrated_too_small_by, expected", [(2, 0.99), (4, 0.89), (8, 0.61), (16, 0.36)]
    )
    def test_runtime_scales_keep_the_size_and_static_ones_do_not(
        self, calibrated_too_small_by, expected, device
    ):
        x = torch.randn(2048, 2048).to(device)  # the size the expected shrinks were measured on
        runtime = ops.tensor_scale(x)
        assert abs(self.shrink(x, runtime) - 1) < 0.01
        packed, sf, scale = ops.quantize_rows(x)
        per_row = ops.dequantize(packed, sf, scale, torch.float32)
        assert abs(float(per_row.abs().mean() / x.abs().mean()) - 1) < 0.01
        # the planted mistake: the shrink that formats in the wild show for this much under-calibration
        assert abs(self.shrink(x, runtime / calibrated_too_small_by) - expected) < 0.015

    def test_layers_do_not_depend_on_any_calibration(self, device):
        """Activations 1000 times larger give outputs 1000 times larger."""
        layer = Nvfp4Tensor.quantize(torch.randn(64, 128))
        x = torch.randn(16, 128).bfloat16()
        args = (layer.packed.to(device), layer.interleaved_sf().to(device), layer.alpha.to(device), "nvfp4")
        one, thousand = (ops.linear((x * s).to(device), *args).cpu().float() for s in (1, 1024))
        assert torch.equal(one * 1024, thousand)

"""What exporters produce is no fault: every quantizer's output passes, and the report says whose it is."""

import json

import checkpoints
import pytest
import torch
from checkpoint_weights import mxfp4

from nvfp4_moe import Nvfp4Tensor, ops
from nvfp4_moe.diagnostics import check_checkpoint

WORDS = {
    "amax": "amax: ",
    "four_over_six": "searched scales",
    "mse": "searched scales",
    "mxfp4": "cast from MXFP4",
}


def quantize(w, method):
    if method == "mxfp4":
        packed, e8m0, _ = mxfp4(w)
        return Nvfp4Tensor(*ops.mxfp4_to_nvfp4(packed, e8m0, "best"))
    return Nvfp4Tensor.quantize(w, method)


@pytest.mark.parametrize("method", WORDS)
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "heavy"])
def test_a_quantizers_output_is_no_fault(method, kind, tmp_path):
    t = {}
    for expert in range(2):
        for names, shape in ((("gate_proj", "up_proj"), (128, 128)), (("down_proj",), (128, 64))):
            w = {"gaussian": torch.randn, "heavy": heavy, "laplace": laplace}[kind](*shape) * 0.02
            q = quantize(w, method)
            step = shape[0] // len(names)
            for i, name in enumerate(names):
                module, rows = f"model.layers.0.mlp.experts.{expert}.{name}", slice(i * step, (i + 1) * step)
                t |= {f"{module}.weight": q.packed[rows], f"{module}.weight_scale": q.sf[rows]}
                t[f"{module}.weight_scale_2"] = q.alpha
                t[f"{module}.input_scale"] = torch.tensor(1e-3 * (1 + expert))
    config = {"num_experts": 2, "quantization_config": checkpoints.modelopt_config(ignore=())}
    checkpoints.write_directory(tmp_path, t, config)
    report = check_checkpoint(tmp_path)
    assert report.findings == [], json.dumps([f.to_dict() for f in report.findings], indent=1)
    assert report.facts["quantizer"].startswith(WORDS[method])


def heavy(*shape):
    """Student's t with 4 degrees of freedom."""
    return torch.distributions.StudentT(4.0).sample(shape)


def laplace(*shape):
    return torch.distributions.Laplace(0.0, 1.0).sample(shape)

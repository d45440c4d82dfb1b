"""open_checkpoint: what contradicts itself, lacks a part or is not FP4 as we know it is refused by name."""

import re

import checkpoints
import pytest
import torch
from checkpoints import remade, write_directory
from compare import assert_same_bits

from nvfp4_moe.checkpoint import CheckpointError, open_checkpoint
from nvfp4_moe.checkpoint.dialects import REFUSED

# ---- configs ----


def test_old_hf_quant_config_is_enough(tiny, tmp_path):
    """DeepSeek's script deletes quantization_config from config.json."""
    truth = tiny("modelopt-w4a16")
    config = {k: v for k, v in truth.config.items() if k != "quantization_config"}
    path = remade(truth, tmp_path, config=config)
    checkpoints.write_hf_quant_config(path, "W4A16_NVFP4")
    checkpoint = open_checkpoint(path)
    assert {m.compute for m in checkpoint.modules.values()} == {"bf16"} and not checkpoint.warnings


def test_without_a_config_input_scales_tell_what_is_computed(tiny, tmp_path):
    for form, compute in (("modelopt", "nvfp4"), ("modelopt-w4a16", "bf16")):
        checkpoint = open_checkpoint(remade(tiny(form), tmp_path / form, config={"model_type": "qwen3_moe"}))
        assert {m.compute for m in checkpoint.modules.values()} == {compute}
        assert any("no config says" in w for w in checkpoint.warnings)


@pytest.mark.parametrize(
    ("claim", "warning"),
    [
        (
            {"quant_method": "compressed-tensors"},
            "quant_method compressed-tensors, the tensors are modelopt-nvfp4",
        ),
        ({"ignore": ["*.experts.2.*"]}, r"experts\.2\.\w+ and 5 more: quantized, though config excludes it"),
        ({"ignore": ["re:.*down_proj"]}, r"down_proj and 7 more: quantized, though config excludes"),
        ({"config_groups": {"g": {"weights": {"group_size": 64}}}}, "group_size 64, the tensors say 16"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_not_believed(tiny, tmp_path, claim, warning):
    truth = tiny("modelopt")
    quantization = truth.config["quantization_config"] | claim
    path = remade(truth, tmp_path, config=truth.config | {"quantization_config": quantization})
    checkpoint = open_checkpoint(path)
    assert checkpoint.format.name == "modelopt-nvfp4"
    assert any(re.search(warning, w) for w in checkpoint.warnings), checkpoint.warnings
    assert_same_bits(
        checkpoint.weight(next(iter(truth.values))).dequantize(), next(iter(truth.values.values()))
    )


def test_a_config_that_promises_fp4_where_there_is_none_is_noted(tiny, tmp_path):
    truth = tiny("bf16")
    path = remade(
        truth, tmp_path, config=truth.config | {"quantization_config": {"quant_method": "modelopt"}}
    )
    assert any("no FP4 weights" in w for w in open_checkpoint(path).warnings)


# ---- refusals ----


@pytest.mark.parametrize("suffix", REFUSED)
def test_layouts_that_are_not_read_are_refused_by_name(tiny, tmp_path, suffix):
    name = "model.layers.0.mlp.experts.0.up_proj" + suffix
    path = remade(tiny("modelopt"), tmp_path, **{name: torch.zeros(4, dtype=torch.uint8)})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert name in str(error.value) and REFUSED[suffix] in str(error.value)


def test_comfyui_is_refused_by_its_metadata(tiny, tmp_path):
    write_directory(tmp_path, {}, {})
    checkpoints.write_file(
        tmp_path / "model.safetensors", tiny("modelopt").tensors, {"_quantization_metadata": "{}"}
    )
    with pytest.raises(CheckpointError, match="ComfyUI"):
        open_checkpoint(tmp_path)


MODULE = "model.layers.0.mlp.experts.0.up_proj"


def broken(form, change):
    """(form, name of the tensor, its new value or None to drop it, what the error says)"""
    return pytest.param(form, *change, id=f"{form}: {change[0]}: {change[2][:30]}")


@pytest.mark.parametrize(
    ("form", "suffix", "change", "says"),
    [
        broken("modelopt", (".weight_scale_2", None, f"{MODULE}: weight_scale_2 is missing")),
        broken("modelopt", (".weight_scale", None, "packed codes without block scales")),
        broken("modelopt", (".weight", None, "a scale without packed codes")),
        broken("compressed-tensors-nvfp4", (".weight_global_scale", None, "weight_global_scale is missing")),
        broken("compressed-tensors-nvfp4", (".weight_packed", None, "a scale without packed codes")),
        broken("compressed-tensors-mxfp4", (".weight_scale", None, "packed codes without block scales")),
        broken(
            "modelopt", (".weight_scale_2", lambda t: t.double(), "alpha must be F32 with 1 value, got F64")
        ),
        broken("modelopt", (".weight_scale_2", lambda t: t.repeat(2), r"1 value, got F32 \[2\]")),
        broken(
            "modelopt",
            (".weight_scale", lambda t: t[:, :3], r"shape \[96, 4\] for codes \[96, 32\], got \[96, 3\]"),
        ),
        broken(
            "modelopt",
            (".weight_scale", lambda t: t.view(torch.uint8).repeat(2, 1), "packed codes without block"),
        ),
        broken(
            "modelopt",
            (
                ".weight_scale",
                lambda t: torch.zeros(128, 4, dtype=torch.uint8).view(torch.float8_e4m3fn),
                "are they interleaved or padded",
            ),
        ),
        broken(
            "compressed-tensors-mxfp4",
            (".weight_scale", lambda t: t.repeat(1, 2), "16 values belongs to NVFP4"),
        ),
        broken(
            "modelopt",
            (".weight", lambda t: t[:, :12].contiguous(), "packed codes of shape|block scales must"),
        ),
    ],
)
def test_a_module_that_is_not_whole_is_an_error_that_names_it(tiny, tmp_path, form, suffix, change, says):
    truth, name = tiny(form), MODULE + suffix
    exchanged = {} if change is None else {name: change(truth.tensors[name])}
    path = remade(truth, tmp_path, drop=[name] if change is None else [], **exchanged)
    with pytest.raises(CheckpointError, match=says) as error:
        open_checkpoint(path)
    assert MODULE in str(error.value)
    lenient = open_checkpoint(path, strict=False)  # for the doctor
    assert MODULE not in lenient.modules and lenient.errors and len(lenient.modules) == 23


@pytest.mark.parametrize(
    ("form", "suffix", "byte", "says"),
    [
        ("modelopt", ".weight_scale", 0x7F, r"NaN or negative block scale at \[1, 2\], 1 of 384"),
        ("modelopt", ".weight_scale", 0xFF, r"NaN or negative block scale at \[1, 2\]"),
        ("modelopt", ".weight_scale", 0xB8, r"NaN or negative block scale at \[1, 2\]"),
        ("compressed-tensors-mxfp4", ".weight_scale", 0xFF, r"NaN block scale \(0xFF\) at \[1, 1\]"),
    ],
)
def test_block_scales_that_make_no_sense_name_their_place(tiny, tmp_path, form, suffix, byte, says):
    """Kimi-K2.6-NVFP4-MSE ships one NaN scale in layers.1.mlp.experts.21.down_proj."""
    truth, name = tiny(form), MODULE + suffix
    scale = truth.tensors[name].clone()
    scale.view(torch.uint8)[1, min(2, scale.shape[1] - 1)] = byte
    checkpoint = open_checkpoint(remade(truth, tmp_path, **{name: scale}))
    with pytest.raises(CheckpointError, match=says) as error:
        checkpoint.weight(MODULE)
    assert name in str(error.value)
    assert checkpoint.weight(MODULE, check=False).shape == (96, 64)
    with pytest.raises(CheckpointError, match=says):
        checkpoint.moe("model.layers.0.mlp")


def test_the_place_is_where_it_lies_in_the_file(tiny, tmp_path):
    truth, name = tiny("modelopt-llama4"), "model.layers.0.feed_forward.experts.gate_up_proj"
    scale = truth.tensors[f"{name}_weight_scale"].clone()
    scale.view(torch.uint8)[2, 3, 150] = 0x7F
    path = remade(truth, tmp_path, **{f"{name}_weight_scale": scale})
    with pytest.raises(CheckpointError, match=r"gate_up_proj_weight_scale: .* at \[2, 3, 150\], 1 of 3072"):
        open_checkpoint(path).weight(name)


def test_a_nan_exponent_on_a_block_of_zeros_is_harmless(tiny, tmp_path):
    truth, name = tiny("compressed-tensors-mxfp4"), MODULE
    scale, packed = (truth.tensors[f"{name}.weight_{s}"].clone() for s in ("scale", "packed"))
    scale[1, 1], packed[1, 16:32] = 0xFF, 0x80
    changed = {f"{name}.weight_scale": scale, f"{name}.weight_packed": packed}
    assert open_checkpoint(remade(truth, tmp_path / "a", **changed)).weight(name).e8m0[1, 1] == 0xFF
    for i, one in enumerate((0x81, 0x10, 0x40)):  # a value in either half of a byte
        packed[1, 31] = one
        checkpoint = open_checkpoint(remade(truth, tmp_path / f"b{i}", **changed))
        with pytest.raises(CheckpointError, match=r"NaN block scale \(0xFF\) at \[1, 1\], 1 of 192"):
            checkpoint.weight(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors-nvfp4"])
def test_a_tensor_scale_that_makes_no_sense_is_an_error(tiny, tmp_path, form, value):
    name = MODULE + (".weight_scale_2" if form == "modelopt" else ".weight_global_scale")
    path = remade(tiny(form), tmp_path, **{name: torch.full_like(tiny(form).tensors[name], value)})
    with pytest.raises(CheckpointError, match="must be finite and positive") as error:
        open_checkpoint(path).weight(MODULE)
    assert name in str(error.value)


def test_a_missing_expert_or_projection_is_named(tiny, tmp_path):
    truth = tiny("modelopt")
    gone = [n for n in truth.tensors if n.startswith("model.layers.0.mlp.experts.2.down_proj.")]
    checkpoint = open_checkpoint(remade(truth, tmp_path / "a", drop=gone))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.2: down is missing"):
        checkpoint.moe("model.layers.0.mlp")
    assert checkpoint.moe("model.layers.1.mlp").w13.shape == (4, 192, 64)
    stacked = tiny("gpt-oss")
    gone = [n for n in stacked.tensors if "layers.0.mlp.experts.down_proj" in n]
    checkpoint = open_checkpoint(remade(stacked, tmp_path / "b", drop=gone))
    with pytest.raises(CheckpointError, match="down_proj is missing"):
        checkpoint.moe("model.layers.0.mlp")


def test_unknown_names_say_what_there_is(tiny):
    checkpoint = open_checkpoint(tiny("modelopt").path)
    with pytest.raises(CheckpointError, match=r"no MoE block 'layers\.0'; there are model\.layers\.0\.mlp"):
        checkpoint.moe("layers.0")
    with pytest.raises(CheckpointError, match="no quantized module 'lm_head'"):
        checkpoint.weight("lm_head")
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        checkpoint.shards["x"]


def test_a_scale_of_zero_is_a_tensor_of_zeros_but_no_divisor(tiny, tmp_path):
    zero = {f"{MODULE}.weight_scale_2": torch.tensor(0.0)}
    assert (
        not open_checkpoint(remade(tiny("modelopt"), tmp_path / "a", **zero))
        .weight(MODULE)
        .dequantize()
        .any()
    )
    zero = {f"{MODULE}.weight_global_scale": torch.tensor([0.0])}
    with pytest.raises(CheckpointError, match="must be finite and positive"):
        open_checkpoint(remade(tiny("compressed-tensors-nvfp4"), tmp_path / "b", **zero)).weight(MODULE)

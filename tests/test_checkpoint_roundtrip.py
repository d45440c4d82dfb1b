"""NVFP4 written in ModelOpt's and in compressed-tensors' names: byte for byte what was read."""

import json

import pytest
import torch
from checkpoints import make, remade
from compare import assert_same_bits

from nvfp4_moe.checkpoint import CheckpointError, Shards, open_checkpoint
from nvfp4_moe.checkpoint.convert import plan_conversion
from nvfp4_moe.checkpoint.quantize import plan_quantization

HOME = {"modelopt": "modelopt-nvfp4", "compressed-tensors": "compressed-tensors-nvfp4"}
SAME = [
    ("modelopt", "modelopt"), ("modelopt-w4a16", "modelopt"), ("modelopt-minimax", "modelopt"),
    ("modelopt-nemotron", "modelopt"), ("compressed-tensors-nvfp4", "compressed-tensors"),
    ("compressed-tensors-nvfp4a16", "compressed-tensors"),
]  # fmt: skip
OTHER = [
    ("modelopt", "compressed-tensors"), ("modelopt-w4a16", "compressed-tensors"),
    ("compressed-tensors-nvfp4", "modelopt"), ("compressed-tensors-nvfp4a16", "modelopt"),
    ("modelopt-nemotron", "compressed-tensors"), ("quark-nvfp4", "modelopt"),
]  # fmt: skip


def rewritten(source, target, to, **options):
    plan_conversion(source, to).run(target, **options)
    return open_checkpoint(target)


def assert_same_tensors(got: Shards, want: Shards) -> None:
    assert set(got) == set(want)
    for name, info in want.tensors.items():
        assert (got.tensors[name].dtype, got.tensors[name].shape) == (info.dtype, info.shape), name
        a, b = (s[name].reshape(-1).view(torch.uint8) for s in (got, want))
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("form", "to"), SAME)
def test_the_same_names_give_the_same_bytes(tiny, tmp_path, form, to):
    source = Shards(tiny(form).path)
    again = rewritten(source.path, tmp_path / "out", to, max_shard_bytes=60_000)
    assert len(again.shards.files) > 2 and again.warnings == []
    assert_same_tensors(again.shards, source)
    computes = {m.compute for m in open_checkpoint(source.path).modules.values()}
    assert {m.compute for m in again.modules.values()} == computes
    twice = rewritten(again.shards.path, tmp_path / "twice", to)
    assert_same_tensors(twice.shards, source)


@pytest.mark.parametrize(("form", "to"), OTHER)
def test_other_names_hold_the_same_codes_and_scales_and_an_alpha_within_one_rounding(
    tiny, tmp_path, form, to
):
    source = open_checkpoint(tiny(form).path)
    other = rewritten(source.shards.path, tmp_path / "out", to)
    assert (
        other.format.name == HOME[to] and other.warnings == [] and set(other.modules) == set(source.modules)
    )
    for name, module in source.modules.items():
        got, want = other.weight(name), source.weight(name)
        assert_same_bits(got.packed, want.packed)
        assert_same_bits(got.sf, want.sf)
        # x -> 1/x rounds once, and once more where a divisor is read back
        torch.testing.assert_close(got.alpha, want.alpha, rtol=2**-23, atol=0)
        assert other.modules[name].compute == module.compute
        scales = other.input_scale(name), source.input_scale(name)
        assert (scales[0] is None) == (scales[1] is None)
        assert scales[0] is None or torch.allclose(*scales, rtol=2**-23, atol=0)
    plain = set(source.plain())
    assert plain == set(other.plain())
    for name in plain:
        assert_same_bits(other.shards[name], source.shards[name], name)


def test_powers_of_two_survive_every_change_of_names(tmp_path):
    """What `best` makes of MXFP4: alphas whose inverse is exact."""
    make(tmp_path / "oss", "gpt-oss", layers=1)
    first = rewritten(tmp_path / "oss", tmp_path / "a", "modelopt")
    second = rewritten(first.shards.path, tmp_path / "b", "compressed-tensors")
    third = rewritten(second.shards.path, tmp_path / "c", "modelopt")
    assert_same_tensors(third.shards, first.shards)


def test_what_the_inverse_rounds_is_measured_and_reported(tiny, tmp_path):
    """1 / x in float32 is not x again: alphas, and input scales, are off by 2^-24 at most."""
    source = open_checkpoint(tiny("modelopt").path)
    result = plan_conversion(source.shards.path, "compressed-tensors").run(tmp_path / "out")
    divisors, rounded = Shards(tmp_path / "out"), 0
    for name in source.modules:
        g = source.shards[f"{name}.weight_scale_2"].double()
        error = abs(float(1 / divisors[f"{name}.weight_global_scale"].double() / g) - 1)
        report = result.reports[name]
        assert report["exact"] == (error == 0) and "relative_rms" not in report
        assert report.get("rounded", {}).get("alpha", 0) == pytest.approx(error, abs=1e-15)
        assert report["rounded"]["input_scale"] == pytest.approx(2.34e-8, rel=0.01)  # of 3 / 2688, in all
        assert error <= 2.0**-24
        rounded += error > 0
    said = json.loads((tmp_path / "out/nvfp4-conversion.json").read_text())
    assert said["rounded"] == rounded > 10 and said["exact"] == 24 - rounded and said["changed"] == 0
    assert said["largest_rounding"] == max(
        r["rounded"]["alpha"] for r in result.reports.values() if not r["exact"]
    )
    back = plan_conversion(tmp_path / "out", "modelopt").run(tmp_path / "back").reports
    assert all("alpha" in r["rounded"] for r in back.values() if not r["exact"])


def test_names_of_the_same_convention_round_nothing(tiny, tmp_path):
    for form, to in SAME:
        reports = plan_conversion(tiny(form).path, to).run(tmp_path / form).reports
        assert all(r["exact"] and "rounded" not in r for r in reports.values()) and len(reports) > 5


def test_no_other_divisor_reads_back_where_the_inverse_does_not():
    """Every float32 of one binade: where 1 / (1 / x) is not x, the divisors next to 1 / x do not give x
    either, so there is nothing better to store; and what is stored is off by 2^-24 at most."""
    x = (torch.arange(2**23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    inverse = x.reciprocal()
    wrong = inverse.reciprocal() != x
    assert 0.17 < wrong.float().mean() < 0.18
    bits = inverse.view(torch.int32)
    for step in (-1, 1):
        assert not ((bits + step).view(torch.float32).reciprocal() == x)[wrong].any()
    assert (x.double() * inverse.double() - 1).abs().max() <= 2.0**-24
    assert (inverse.reciprocal() / x - 1).abs().max() < 1.2e-7


@pytest.mark.parametrize("to", HOME)
def test_a_matrix_of_zeros_has_a_scale_in_every_convention(tiny, tmp_path, to):
    """Its alpha is 0, which has no inverse; compressed-tensors stores 1."""
    name = "model.layers.0.mlp.experts.1.down_proj"
    path = remade(tiny("bf16"), tmp_path / "in", **{f"{name}.weight": torch.zeros(64, 96).bfloat16()})
    plan_quantization(path, to).run(tmp_path / "q")
    for other in HOME:
        result = plan_conversion(tmp_path / "q", other).run(tmp_path / other)
        assert result.reports[name]["exact"]
        weight = open_checkpoint(tmp_path / other).weight(name)
        assert not weight.dequantize().any() and not (weight.packed & 0x77).any()


def test_codes_under_an_alpha_of_zero_have_no_inverse(tiny, tmp_path):
    name = "model.layers.0.mlp.experts.1.down_proj.weight_scale_2"
    path = remade(tiny("modelopt"), tmp_path / "in", **{name: torch.tensor(0.0)})
    with pytest.raises(CheckpointError, match="scale 0 has no float32 inverse"):
        plan_conversion(path, "compressed-tensors").run(tmp_path / "out")


@pytest.mark.parametrize("form", ["modelopt-llama4", "modelopt-gpt-oss"])
def test_stacked_experts_are_written_one_by_one(tiny, tmp_path, form):
    source = open_checkpoint(tiny(form).path)
    once = rewritten(source.shards.path, tmp_path / "out", "modelopt")
    for prefix in source.moe_layers():
        a, b = once.moe(prefix), source.moe(prefix)
        assert_same_bits(a.w13.dequantize(), b.w13.dequantize())
        assert_same_bits(a.w2.dequantize(), b.w2.dequantize())
        for x, y in zip(a.biases() or (), b.biases() or (), strict=True):
            assert_same_bits(x.contiguous(), y.contiguous())
    assert all(m.experts is None for m in once.modules.values())


def test_the_configs_say_what_was_written(tiny, tmp_path):
    rewritten(tiny("modelopt").path, tmp_path / "ct", "compressed-tensors")
    said = json.loads((tmp_path / "ct/config.json").read_text())
    assert said["model_type"] == "qwen3_moe" and not (tmp_path / "ct/hf_quant_config.json").exists()
    said = said["quantization_config"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    assert said["config_groups"]["group_0"]["weights"]["group_size"] == 16
    rewritten(tmp_path / "ct", tmp_path / "mo", "modelopt")
    legacy = json.loads((tmp_path / "mo/hf_quant_config.json").read_text())["quantization"]
    assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= set(legacy)  # vLLM demands these
    assert legacy["quant_algo"] == "NVFP4"


@pytest.mark.parametrize("form", ["modelopt-mixed", "modelopt-awq"])
def test_what_the_target_cannot_say_is_refused(tiny, tmp_path, form):
    with pytest.raises(CheckpointError, match=r"is F8_E4M3: other quantized weights|pre_quant_scale"):
        plan_conversion(tiny(form).path, "modelopt")

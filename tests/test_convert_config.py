"""What a converted checkpoint's configs say, and what the user is told before."""

import json

import pytest
from checkpoints import make, remade, write_hf_quant_config

from nvfp4_moe.checkpoint import CheckpointError, open_checkpoint
from nvfp4_moe.checkpoint.convert import plan_conversion, surely_exact
from nvfp4_moe.checkpoint.quantize import plan_quantization

FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
CT_FP8 = FP8 | {"strategy": "tensor", "symmetric": True}


def said_by(path) -> dict:
    return json.loads((path / "config.json").read_text())


def with_kv(truth, path, in_config=None, in_legacy=None):
    said = truth.config["quantization_config"] | ({"kv_cache_scheme": in_config} if in_config else {})
    remade(truth, path, config=truth.config | {"quantization_config": said})
    if in_legacy:
        write_hf_quant_config(path, kv_cache_quant_algo=in_legacy)
    return path


class TestTheKvCache:
    @pytest.mark.parametrize(
        "form, in_config, in_legacy",
        [
            ("modelopt", FP8, "FP8"),
            ("modelopt", None, "FP8"),
            ("modelopt", "FP8", None),
            ("modelopt", FP8, None),
            ("compressed-tensors-nvfp4", CT_FP8, None),
        ],
    )
    @pytest.mark.parametrize("to", ["modelopt", "compressed-tensors"])
    def test_in_fp8_stays_so_whoever_says_it_and_how(self, form, in_config, in_legacy, to, tiny, tmp_path):
        source = with_kv(tiny(form), tmp_path / "in", in_config, in_legacy)
        plan = plan_conversion(source, to)
        plan.run(tmp_path / "out")
        scheme = said_by(tmp_path / "out")["quantization_config"]["kv_cache_scheme"]
        assert scheme == (FP8 if to == "modelopt" else CT_FP8) and not plan.notes
        if to == "modelopt":
            legacy = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
            assert legacy["kv_cache_quant_algo"] == "FP8"

    def test_in_another_type_is_said_to_be_left_out(self, tiny, tmp_path):
        source = with_kv(tiny("modelopt"), tmp_path / "in", None, "NVFP4")
        plan = plan_conversion(source, "compressed-tensors")
        assert any("KV cache's NVFP4 is not carried over" in note for note in plan.notes)
        plan_conversion(source, "modelopt").run(tmp_path / "out")
        assert said_by(tmp_path / "out")["quantization_config"]["kv_cache_scheme"] == "NVFP4"

    def test_that_is_not_quantized_stays_so(self, tiny, tmp_path):
        for to in ("modelopt", "compressed-tensors"):
            plan_conversion(tiny("modelopt").path, to).run(tmp_path / to)
            assert not said_by(tmp_path / to)["quantization_config"].get("kv_cache_scheme")


def test_a_checkpoint_of_which_some_have_no_input_scale_says_weights_only(tiny, tmp_path):
    """An engine that quantizes activations would read 0 for the others."""
    truth = tiny("modelopt")
    path = remade(truth, tmp_path / "in", drop=["model.layers.1.mlp.experts.2.up_proj.input_scale"])
    for to in ("modelopt", "compressed-tensors"):
        plan_conversion(path, to).run(tmp_path / to)
        assert {m.compute for m in open_checkpoint(tmp_path / to).modules.values()} == {"bf16"}


def test_what_an_inner_config_said_of_the_source_goes(tiny, tmp_path):
    """Models that see keep it in text_config."""
    truth = tiny("kimi-k3")
    config = {k: v for k, v in truth.config.items() if k != "quantization_config"}
    inner = truth.config["text_config"] | {"quantization_config": truth.config["quantization_config"]}
    source = remade(truth, tmp_path / "in", config=config | {"text_config": inner})
    plan_conversion(source, "modelopt").run(tmp_path / "out")
    said = said_by(tmp_path / "out")
    assert "quantization_config" not in said["text_config"]
    assert said["text_config"] == truth.config["text_config"]
    assert said["quantization_config"]["quant_method"] == "modelopt"
    assert open_checkpoint(tmp_path / "out").warnings == []


def test_deepseek_v4_says_fp8_even_if_its_source_said_nothing(tiny, tmp_path):
    truth = tiny("deepseek-v4")
    config = {k: v for k, v in truth.config.items() if k != "quantization_config"}
    plan_conversion(remade(truth, tmp_path / "in", config=config)).run(tmp_path / "out")
    said = said_by(tmp_path / "out")["quantization_config"]
    assert said["quant_method"] == "fp8" and said["moe_quant_algo"] == "W4A16_NVFP4"
    after = open_checkpoint(tmp_path / "out")
    assert after.format.name == "deepseek-v4-nvfp4" and not after.warnings


def test_gpt_oss_within_a_larger_model_interleaves_too(tiny, tmp_path):
    truth = tiny("modelopt-gpt-oss")
    outer = {"model_type": "seer", "text_config": {"model_type": "gpt_oss"}}
    path = remade(
        truth, tmp_path, config=outer | {"quantization_config": truth.config["quantization_config"]}
    )
    got, want = (open_checkpoint(p).moe("model.layers.0.mlp").w13.packed for p in (path, truth.path))
    assert (got == want).all()


@pytest.mark.parametrize("plan", [plan_conversion, plan_quantization])
class TestAPlan:
    def source(self, plan, path):
        return make(path, "bf16" if plan is plan_quantization else "gpt-oss").path

    def test_says_that_folders_are_not_copied(self, plan, tmp_path):
        source = self.source(plan, tmp_path)
        assert not plan(source).notes
        for folder in ("inference", "encoding", ".cache"):
            (source / folder).mkdir()
        assert plan(source).notes == ("folders of the source are not copied: encoding, inference",)

    @pytest.mark.parametrize("amax", [0.0, -1.0, float("nan"), float("inf"), 1e-36, 1e50])
    def test_refuses_an_activation_amax_that_is_none(self, amax, plan, tmp_path):
        with pytest.raises(CheckpointError, match="activation_amax must be a positive number"):
            plan(self.source(plan, tmp_path), activation_amax=amax)

    @pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", ""])
    def test_refuses_a_device_that_is_not_there_before_it_writes(self, device, plan, tmp_path):
        with pytest.raises(CheckpointError, match=f"device '{device}': "):
            plan(self.source(plan, tmp_path), device=device)

    def test_of_another_config_does_not_resume(self, plan, tmp_path):
        """The model's type decides which rows are gate's, and no tensor's name or shape would tell."""
        source = self.source(plan, tmp_path / "in")
        first = plan(source)
        with pytest.raises(KeyboardInterrupt):
            first.run(tmp_path / "out", progress=interrupt)
        config = said_by(source)
        (source / "config.json").write_text(json.dumps(config | {"model_type": "other"}))
        with pytest.raises(CheckpointError, match="another source or with other options"):
            plan(source).run(tmp_path / "out")
        (source / "config.json").write_text(json.dumps(config))
        plan(source).run(tmp_path / "out")


def interrupt(nbytes: int) -> None:
    raise KeyboardInterrupt


def test_a_dry_run_counts_the_bytes_of_the_scales(tmp_path):
    make(tmp_path, "gpt-oss")
    seen = []
    surely_exact(tmp_path, lambda now, total: seen.append((now, total)))
    assert len(seen) == 4 and sum(now for now, _ in seen) == seen[0][1]

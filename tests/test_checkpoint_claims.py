"""What configs claim, and what follows for a module: whether its activations are quantized too."""

import pytest
from checkpoints import ct_config, modelopt_config, remade

from nvfp4_moe.checkpoint import CheckpointError, open_checkpoint
from nvfp4_moe.checkpoint.claims import is_gpt_oss, read_claims

NAME = "model.layers.1.mlp.experts.3.up_proj"
CT = "compressed-tensors"


def compute(config: dict, legacy=None, kind="nvfp4", has_input_scale=False, name=NAME) -> str:
    quant_config = None if legacy is None else {"quantization": legacy}
    return read_claims({"quantization_config": config} if config else {}, quant_config).compute(
        name, kind, has_input_scale
    )


class TestCompute:
    @pytest.mark.parametrize(
        "algo, want",
        [
            ("NVFP4", "nvfp4"), ("nvfp4", "nvfp4"), ("NVFP4_AWQ", "nvfp4"), ("W4A16_NVFP4", "bf16"),
            ("w4a16_nvfp4", "bf16"), ("W4A8_NVFP4_FP8", "bf16"),
        ],
    )  # fmt: skip
    def test_of_modelopts_algorithms(self, algo, want):
        assert compute({"quant_method": "modelopt", "quant_algo": algo}) == want
        assert compute({}, {"quant_algo": algo}) == want
        inner = {"text_config": {"quantization_config": {"quant_method": "modelopt", "quant_algo": algo}}}
        assert read_claims(inner, None).compute(NAME, "nvfp4", False) == want

    def test_without_any_claim_input_scales_tell(self):
        assert compute({}, has_input_scale=True) == "nvfp4" and compute({}) == "bf16"

    @pytest.mark.parametrize(
        "listed, want",
        [
            ("model.layers.1.mlp.experts.3.up_proj", "bf16"), ("model.layers.1.mlp.experts", "bf16"),
            ("model.layers.1", "bf16"), ("model.layers.10.mlp.experts", "nvfp4"),
            ("model.layers.1.ml", "nvfp4"),
        ],
    )  # fmt: skip
    def test_the_layer_that_is_named_goes_before_the_rest(self, listed, want):
        said = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
        said["quantized_layers"] = {listed: {"quant_algo": "w4a16_nvfp4"}}
        assert compute(said) == want
        said["quantized_layers"] |= {NAME: {"quant_algo": "NVFP4"}}
        assert compute(said) == "nvfp4"  # the narrowest
        assert compute({}, {"quantized_layers": said["quantized_layers"]}) == "nvfp4"

    def test_of_modelopts_groups_one_with_activations_is_enough(self):
        said = modelopt_config("NVFP4")
        weights = said["config_groups"]["group_0"]["weights"]
        only = {"weights": weights, "input_activations": None, "targets": ["Linear"]}
        assert compute(said | {"config_groups": {"group_0": only}}) == "bf16"
        both = {"group_0": said["config_groups"]["group_0"], "group_1": only | {"targets": ["lm_head"]}}
        assert compute(said | {"config_groups": both}) == "nvfp4"

    @pytest.mark.parametrize(
        "activations, want",
        [
            (None, "bf16"), ({"num_bits": 4}, "nvfp4"), ({"num_bits": 8, "type": "float"}, "bf16"),
            ({"dynamic": True}, "nvfp4"),
        ],
    )  # fmt: skip
    def test_of_compressed_tensors_groups(self, activations, want):
        said = ct_config("nvfp4-pack-quantized")
        said["config_groups"]["group_0"]["input_activations"] = activations
        assert compute(said) == want

    def test_the_first_group_that_targets_a_module_counts(self):
        four, none = {"input_activations": {"num_bits": 4}}, {"input_activations": None}
        said = {"quant_method": CT}
        for targets, want in (
            ([r"re:.*layers\.1\..*"], "bf16"),
            (["model.layers.1.mlp"], "bf16"),
            (["*.up_proj"], "bf16"),
            (["re:.*layers.2.*", "lm_head"], "nvfp4"),
            (["Linear"], "bf16"),
        ):
            groups = {"a": none | {"targets": targets}, "b": four | {"targets": ["Linear"]}}
            assert compute(said | {"config_groups": groups}) == want, targets

    def test_of_quark_and_deepseek(self):
        quark = {"quant_method": "quark", "global_quant_config": {"input_tensors": {"dtype": "fp4"}}}
        assert compute(quark) == "nvfp4"
        assert compute(quark | {"global_quant_config": {"input_tensors": None}}) == "bf16"
        assert compute({"quant_method": "fp8"}, kind="mxfp4", has_input_scale=True) == "bf16"
        assert compute({"quant_method": "fp8", "moe_quant_algo": "NVFP4"}) == "nvfp4"
        assert compute({"quant_method": "fp8", "moe_quant_algo": "NVFP4"}, kind="mxfp4") == "bf16"
        assert compute({"quant_method": "mxfp4"}, kind="mxfp4") == "bf16"


def test_what_is_excluded_stands_under_four_names():
    for key in ("ignore", "modules_to_not_convert", "exclude"):
        assert read_claims({"quantization_config": {key: ["lm_head"]}}, None).excludes("lm_head") == "lm_head"
    legacy = {"quantization": {"exclude_modules": ["*self_attn*"]}}
    assert read_claims({}, legacy).excludes("model.layers.0.self_attn.q_proj") == "*self_attn*"


def test_group_sizes_of_every_config_are_found():
    assert read_claims({"quantization_config": {"group_size": 32}}, None).group_size == 32
    assert read_claims({}, {"quantization": {"group_size": 16}}).group_size == 16
    assert read_claims({"quantization_config": ct_config("mxfp4-pack-quantized")}, None).group_size == 32


def test_a_method_that_is_not_the_tensors_is_said(tiny, tmp_path):
    truth = tiny("modelopt")
    config = truth.config | {"quantization_config": {"quant_method": "mxfp4", "group_size": 128}}
    warnings = " | ".join(open_checkpoint(remade(truth, tmp_path, config=config)).warnings)
    assert "quant_method mxfp4, the tensors are modelopt-nvfp4" in warnings
    assert "group_size 128, the tensors say 16" in warnings


@pytest.mark.parametrize(
    "config", [{"text_config": 3}, {"model_type": ["gpt_oss"]}, {"text_config": {"model_type": None}}]
)
def test_odd_configs_are_no_gpt_oss(config):
    assert not is_gpt_oss(config) and read_claims(config, None).method is None


@pytest.mark.parametrize("legacy", [{"quantization": [1]}, {"quantization": "NVFP4"}])
def test_a_legacy_config_that_is_none_is_an_error(legacy):
    with pytest.raises(CheckpointError, match="hf_quant_config"):
        read_claims({}, legacy)


def test_quarks_input_scales_are_found(tiny):
    name = "model.layers.0.mlp.experts.0.up_proj"
    truth = tiny("quark-nvfp4")
    assert open_checkpoint(truth.path).input_scale(name) == truth.tensors[f"{name}.input_scale_2"]

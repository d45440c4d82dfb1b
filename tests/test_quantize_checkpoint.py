"""nvfp4 quantize: which weights of a BF16 checkpoint become NVFP4, and what they become."""

import json

import pytest
import torch
from checkpoint_weights import random_weight
from checkpoints import make, write_directory
from compare import assert_same_bits, relative_rms

from nvfp4_moe.checkpoint import CheckpointError, open_checkpoint
from nvfp4_moe.checkpoint.quantize import plan_quantization
from nvfp4_moe.tensor import Nvfp4Tensor

H, I, E = 64, 96, 4
ATTENTION = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]


def quantized(path, **options) -> list[str]:
    return sorted(plan_quantization(path, **options).modules)


def kinds(names) -> set[str]:
    """Names without their layer and expert."""
    return {".".join(p for p in n.removeprefix("model.layers.").split(".") if not p.isdigit()) for n in names}


class TestChooses:
    @pytest.fixture
    def source(self, tmp_path):
        make(tmp_path, "bf16")
        return tmp_path

    EXPERTS = frozenset(f"mlp.experts.{p}_proj" for p in ("gate", "up", "down"))

    def test_routed_experts(self, source):
        names = quantized(source)
        assert kinds(names) == self.EXPERTS and len(names) == 2 * E * 3

    def test_all_linears_but_routers_heads_and_embeddings(self, source):
        assert kinds(quantized(source, layers="linears")) == {*self.EXPERTS, *ATTENTION}

    @pytest.mark.parametrize(
        "options, more, fewer",
        [
            ({"include": ["lm_head"]}, ["lm_head"], []),
            ({"include": ["*.self_attn.o_proj"]}, ["self_attn.o_proj"], []),
            ({"include": [r"re:.*\.[qk]_proj$"]}, ["self_attn.q_proj", "self_attn.k_proj"], []),
            ({"exclude": ["*.down_proj"]}, [], ["mlp.experts.down_proj"]),
            ({"include": ["lm_head"], "exclude": ["lm_head"]}, [], []),
        ],
        ids=str,
    )
    def test_patterns_add_and_take_away(self, options, more, fewer, source):
        assert kinds(quantized(source, **options)) == self.EXPERTS.union(more).difference(fewer)

    def test_a_pattern_that_matches_nothing_is_an_error(self, source):
        with pytest.raises(CheckpointError, match=r"pattern 'lm_heat' matches no weight"):
            plan_quantization(source, include=["lm_heat"])

    def test_shared_experts_and_routers_of_other_names_stay(self, tmp_path):
        names = [
            "mlp.shared_expert.up_proj", "mlp.shared_expert_gate", "mlp.router", "block_sparse_moe.gate",
            "mlp.experts.0.up_proj", "embed_tokens", "input_layernorm", "self_attn.q_norm",
            "linear_attn.conv1d",
        ]  # fmt: skip
        write_directory(tmp_path, {f"model.layers.0.{n}.weight": random_weight(32, 64) for n in names}, {})
        assert kinds(quantized(tmp_path)) == {"mlp.experts.up_proj"}
        assert kinds(quantized(tmp_path, layers="linears")) == {
            "mlp.experts.up_proj", "mlp.shared_expert.up_proj",
        }  # fmt: skip

    def test_a_k_that_blocks_of_16_do_not_divide_is_left_and_said(self, tmp_path):
        t = {"a.experts.0.w1.weight": random_weight(8, 40), "a.experts.0.w2.weight": random_weight(8, 32)}
        write_directory(tmp_path, t, {})
        plan = plan_quantization(tmp_path)
        assert plan.modules == ["a.experts.0.w2"]
        assert "a.experts.0.w1: K = 40" in plan.notes[-1]

    def test_nothing_at_all_is_an_error_with_a_hint(self, tmp_path):
        write_directory(tmp_path, {"a.q_proj.weight": random_weight(16, 32)}, {})
        with pytest.raises(CheckpointError, match="--layers linears"):
            plan_quantization(tmp_path)

    def test_a_checkpoint_quantized_in_another_way_is_refused(self, tmp_path):
        """Its FP8 layers would have lost their config, and been read as garbage."""
        names = ["a.experts.0.w2.weight", "a.q_proj.weight"]
        t = {names[0]: random_weight(16, 32), names[1]: torch.zeros(16, 32).to(torch.float8_e4m3fn)}
        write_directory(tmp_path, t, {"quantization_config": {"quant_method": "fp8"}})
        with pytest.raises(CheckpointError, match="quant_method is fp8: only unquantized weights are read"):
            plan_quantization(tmp_path)

    def test_a_quantized_checkpoint_is_refused(self, tmp_path):
        make(tmp_path, "gpt-oss")
        with pytest.raises(CheckpointError, match="nvfp4 convert"):
            plan_quantization(tmp_path)


@pytest.mark.parametrize("to", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("method, bound", [("amax", 0.097), ("four_over_six", 0.089), ("mse", 0.083)])
def test_weights_are_what_nvfp4tensor_makes_of_them(to, method, bound, tmp_path):
    """bound: the relative RMS error on Gaussian data (docs/formats.md), and 2 % for a small sample."""
    truth = make(tmp_path / "source", "bf16", shards=3)
    result = plan_quantization(tmp_path / "source", to, method, "linears").run(tmp_path / "target")
    after = open_checkpoint(tmp_path / "target")
    assert not after.warnings and after.format.name == f"{to}-nvfp4"
    errors = []
    for mlp in truth.moe:
        for e in range(E):
            gate, up, down = (
                truth.tensors[f"{mlp}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")
            )
            w = Nvfp4Tensor.quantize(torch.cat([gate, up]), method)  # they share alpha
            got = after.weight(f"{mlp}.experts.{e}.up_proj")
            alpha = w.alpha if to == "modelopt" else w.alpha.reciprocal().reciprocal()
            assert_same_bits((got.packed, got.sf, got.alpha), (w.packed[I:], w.sf[I:], alpha))
            errors.append(relative_rms(after.weight(f"{mlp}.experts.{e}.down_proj").dequantize(), down))
            told = result.reports[f"{mlp}.experts.{e}.down_proj"]["relative_rms"]
            assert told == pytest.approx(errors[-1], rel=1e-4)
    assert sum(errors) / len(errors) < 1.02 * bound
    rest = set(truth.tensors) - {f"{m}.weight" for m in after.modules}
    for name in rest:
        assert_same_bits(after.shards[name], truth.tensors[name], name)


class TestStackedExperts:
    """transformers keeps experts stacked: [E, K, 2I] in Llama 4 and gpt-oss, [E, 2I, K] in newer models."""

    def source(self, path, model_type, columns: bool, bias: bool = False, hidden: int = H):
        gate_up, down = random_weight(E, 2 * I, hidden), random_weight(E, hidden, I)
        prefix = "model.layers.0.mlp.experts"
        turn = (lambda w: w.transpose(1, 2).contiguous()) if columns else (lambda w: w)
        tensors = {f"{prefix}.gate_up_proj": turn(gate_up), f"{prefix}.down_proj": turn(down)}
        if bias:
            tensors[f"{prefix}.gate_up_proj_bias"] = random_weight(E, 2 * I)
            tensors[f"{prefix}.down_proj_bias"] = random_weight(E, hidden)
        write_directory(path, tensors, {"model_type": model_type, "hidden_size": hidden})
        return gate_up, down, tensors

    @pytest.mark.parametrize(
        "model_type, columns, interleaved",
        [
            ("llama4", True, False),
            ("gpt_oss", True, True),
            ("qwen3_5_moe", False, False),
            ("new", True, False),
        ],
    )
    def test_are_split_the_way_the_model_stores_them(self, model_type, columns, interleaved, tmp_path):
        gate_up, down, tensors = self.source(tmp_path / "source", model_type, columns, bias=interleaved)
        plan_quantization(tmp_path / "source").run(tmp_path / "target")
        moe = open_checkpoint(tmp_path / "target").moe("model.layers.0.mlp")
        order = torch.arange(2 * I).view(-1, 2).T.flatten() if interleaved else torch.arange(2 * I)
        assert relative_rms(moe.w13.dequantize(), gate_up[:, order].float()) < 0.1
        assert relative_rms(moe.w2.dequantize(), down.float()) < 0.1
        if interleaved:
            bias = tensors["model.layers.0.mlp.experts.gate_up_proj_bias"]
            assert torch.equal(moe.w13_bias, bias[:, order].float())

    def test_a_square_that_could_be_either_is_refused(self, tmp_path):
        self.source(tmp_path, "unknown", columns=False, hidden=2 * I)
        with pytest.raises(CheckpointError, match=r"\[E, K, N\] or \[E, N, K\]"):
            plan_quantization(tmp_path)


def test_a_nan_in_the_source_is_an_error_by_name(tmp_path):
    w = random_weight(16, 32)
    w[3, 4] = float("nan")
    write_directory(tmp_path / "source", {"a.experts.0.w2.weight": w}, {})
    with pytest.raises(CheckpointError, match=r"a\.experts\.0\.w2\.weight: holds NaN or Inf"):
        plan_quantization(tmp_path / "source").run(tmp_path / "target")


def test_an_activation_amax_makes_it_w4a4(tmp_path):
    make(tmp_path / "source", "bf16")
    plan_quantization(tmp_path / "source", activation_amax=100.0).run(tmp_path / "target")
    after = open_checkpoint(tmp_path / "target")
    assert {m.compute for m in after.modules.values()} == {"nvfp4"}
    said = json.loads((tmp_path / "target/hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "NVFP4" and "model.layers.*.mlp.gate" in said["exclude_modules"]


@pytest.mark.parametrize("to", ["modelopt", "compressed-tensors"])
def test_the_config_names_a_layer_in_full_where_a_star_would_hit_a_quantized_one(to, tmp_path):
    make(tmp_path / "source", "bf16")
    plan = plan_quantization(tmp_path / "source", to, layers="linears", exclude=[r"re:model\.layers\.0\."])
    plan.run(tmp_path / "target")
    after = open_checkpoint(tmp_path / "target")
    ignored = json.loads((tmp_path / "target/config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.self_attn.q_proj" in ignored and "model.layers.*.self_attn.q_proj" not in ignored
    assert all("layers.1." in name for name in after.modules)
    assert not any(after.claims.excludes(name) for name in after.modules)
    assert after.claims.excludes("model.layers.0.self_attn.q_proj") and after.claims.excludes("lm_head")

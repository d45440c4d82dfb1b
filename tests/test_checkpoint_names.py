"""Names and patterns of modules: what they say, and that a hostile pattern cannot hold us up."""

import time

import pytest
from checkpoints import modelopt_config, remade

from nvfp4_moe.checkpoint import CheckpointError, names, open_checkpoint, patterns
from nvfp4_moe.checkpoint.patterns import Entries, matches, refusal_of
from nvfp4_moe.checkpoint.quantize import plan_quantization
from nvfp4_moe.diagnostics import check_checkpoint

MODULE = "model.layers.3.mlp.experts.12.gate_proj"
ORDINARY = [
    (r"re:.*mlp.gate$", "model.layers.0.mlp.gate", MODULE),
    (r"re:.*self_attn.(q|k|v)_proj", "model.layers.0.self_attn.k_proj", MODULE),
    (r"re:.*layers\.\d+\..*proj$", MODULE, "lm_head"),
    (r"re:^(?!.*experts).*", "lm_head", MODULE),
    (r"re:model\.layers\.(0|1|2|3)\.", MODULE, "model.layers.13.mlp"),
    ("*.experts.*", MODULE, "lm_head"),
    ("model.layers.?.mlp*", MODULE, "model.layers.13.mlp"),
    ("mlp.experts", MODULE, "model.layers.3.mlp.expertss"),
    ("lm_head", "lm_head", "lm_head2"),
]
HOSTILE = [
    "re:(a+)+$", "re:(a|aa)*$", "re:(.*)*x", "re:(x+x+)+y", "re:([a-z]+)*!", "re:(a{0,9}){0,9}b",
    "re:" + "a?" * 40 + "a" * 40, "re:" + ".*" * 12 + "x", "re:" + "a{0,15}" * 20 + "b",
    "re:" + "(a|aa)" * 40 + "b", r"re:(a*)\1+x", "re:" + "(" * 400, "re:a{99999999999}", "re:[",
    "re:" + "x" * 2000, "*a" * 2000,
]  # fmt: skip
LONG = "a" * 600
LINEARS = (
    "q_proj", "o_proj", "gate_proj", "down_proj", "w1", "w2", "w3", "wq_a", "wkv", "wo_b", "fc1", "dense",
    "qkv", "in_proj", "out_proj", "gate_up_proj", "dense_4h_to_h",
)  # fmt: skip
NO_LINEARS = (
    "embed_tokens", "wte", "wpe", "tok_embeddings", "rotary_emb", "lm_head", "head", "output", "router",
    "gate", "input_layernorm", "q_norm", "shared_expert_gate", "classifier", "score", "conv1d", "dt_proj",
    "x_proj", "weights_proj", "relative_attention_bias",
)  # fmt: skip


class TestPatterns:
    @pytest.mark.parametrize("entry, fits, not_this", ORDINARY)
    def test_fit_what_they_say(self, entry, fits, not_this):
        assert matches(entry, fits) and not matches(entry, not_this) and refusal_of(entry) is None
        both = Entries(["never", entry])
        assert both.first_match(fits) == entry and both.every_match(fits) == [entry]

    @pytest.mark.parametrize("entry", HOSTILE, ids=lambda e: e[:20])
    def test_that_could_take_for_ever_are_refused_at_once(self, entry):
        begun = time.perf_counter()
        entries = Entries([entry, "lm_head"])
        for name in (LONG, "a" * 90 + "!", "x" * 90, MODULE):
            entries.first_match(name)
        assert time.perf_counter() - begun < 5
        assert entry in entries.refused and entries.refused[entry].isprintable()
        assert entries.first_match("lm_head") == "lm_head"

    def test_a_list_of_them_has_a_limit_too(self, monkeypatch):
        monkeypatch.setattr(patterns, "MAX_SECONDS", -1)
        entries = Entries(["re:.*x", "lm_head"])
        assert entries.first_match("x") == "re:.*x"
        assert entries.refused.keys() == {"re:.*x"} and entries.first_match("x") is None
        assert entries.first_match("lm_head") == "lm_head"

    def test_a_config_with_one_opens_and_says_so(self, tiny, tmp_path):
        truth = tiny("modelopt")
        config = truth.config | {"quantization_config": modelopt_config(ignore=("lm_head", *HOSTILE))}
        path = remade(truth, tmp_path, config=config)
        begun = time.perf_counter()
        warnings = open_checkpoint(path).warnings
        assert len([w for w in warnings if "is not applied" in w]) == len(HOSTILE)
        report = check_checkpoint(path)
        assert {"config-pattern"} <= {f.fault for f in report.findings}
        assert time.perf_counter() - begun < 20

    def test_a_target_that_could_take_for_ever_is_named(self, tiny, tmp_path):
        truth = tiny("compressed-tensors-nvfp4")
        config = {**truth.config, "quantization_config": {**truth.config["quantization_config"]}}
        group = config["quantization_config"]["config_groups"]["group_0"]
        config["quantization_config"]["config_groups"] = {"group_0": {**group, "targets": ["re:(a+)+$"]}}
        checkpoint = open_checkpoint(remade(truth, tmp_path, config=config))
        assert any("re:(a+)+$" in w and "not applied" in w for w in checkpoint.warnings)

    def test_a_users_own_is_an_error(self, tiny):
        for option in ("include", "exclude"):
            with pytest.raises(CheckpointError, match=r"pattern 're:\(a\+\)\+\$': a repeat within a repeat"):
                plan_quantization(tiny("bf16").path, **{option: ["re:(a+)+$"]})
        with pytest.raises(CheckpointError, match=r"'re:\[': it is no regular expression"):
            plan_quantization(tiny("bf16").path, exclude=["re:["])


class TestNames:
    @pytest.mark.parametrize("last", LINEARS)
    def test_linears(self, last):
        assert names.is_linear(f"model.layers.0.mlp.{last}")

    @pytest.mark.parametrize("last", NO_LINEARS)
    def test_what_is_none(self, last):
        assert not names.is_linear(f"model.layers.0.mlp.{last}") and not names.is_linear(last)

    def test_fused_groups_are_in_the_engines_order(self):
        shapes = {f"a.{n}": (8, 64) for n in ("up_proj", "v_proj", "k_proj", "gate_proj", "q_proj", "o_proj")}
        groups = {tuple(n.removeprefix("a.") for n in g) for g in names.fused_groups(shapes)}
        assert groups == {("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"), ("o_proj",)}
        latent = {
            "a.kv_proj": (8, 64),
            "a.q_a_proj": (8, 64),
            "b.kv_a_proj_with_mqa": (8, 64),
            "b.w3": (8, 64),
        }
        groups = {tuple(g) for g in names.fused_groups(latent)}
        assert groups == {("a.q_a_proj", "a.kv_proj"), ("b.kv_a_proj_with_mqa",), ("b.w3",)}

    def test_other_inputs_are_not_fused(self):
        shapes = {"a.q_proj": (8, 64), "a.k_proj": (8, 32), "b.q_proj": (8, 64)}
        assert names.fused_groups(shapes) == [["a.q_proj"], ["a.k_proj"], ["b.q_proj"]]

    def test_numbers_of_experts_have_one_spelling(self):
        for number in ("0", "7", "511", "999999"):
            assert names.EXPERT.fullmatch(f"m.experts.{number}.w1")[2] == number
        for number in ("01", "1000000", "9" * 5000, "²", "٣", "-1", ""):
            assert not names.EXPERT.fullmatch(f"m.experts.{number}.w1")
            assert names.starred(f"m.{number}.x") == f"m.{number}.x"

    def test_order_and_stars(self):
        unsorted = ["l.10.a", "l.2.a", "l.2", "l.x", "l.².b"]
        assert sorted(unsorted, key=names.natural) == ["l.x", "l.².b", "l.2", "l.2.a", "l.10.a"]
        assert names.starred("model.layers.3.mlp") == "model.layers.*.mlp"

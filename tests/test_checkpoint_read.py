"""open_checkpoint: every format's weights come out as what went in."""

import json

import pytest
import torch
from checkpoint_weights import INPUT_SCALE
from checkpoints import FORMS, remade
from compare import assert_close_layers, assert_same_bits

from nvfp4_moe import Mxfp4Tensor, Nvfp4MoE, Nvfp4Tensor, Router, ops
from nvfp4_moe.checkpoint import CheckpointError, open_checkpoint

QUANTIZED = [form for form in FORMS if form != "bf16"]
# format, compute of the routed experts
FOUND = {
    "modelopt": ("modelopt-nvfp4", "nvfp4"),
    "modelopt-w4a16": ("modelopt-nvfp4", "bf16"),
    "modelopt-mixed": ("modelopt-nvfp4", "nvfp4"),
    "modelopt-awq": ("modelopt-nvfp4", "nvfp4"),
    "modelopt-minimax": ("modelopt-nvfp4", "nvfp4"),
    "modelopt-nemotron": ("modelopt-nvfp4", "nvfp4"),
    "modelopt-llama4": ("modelopt-nvfp4", "nvfp4"),
    "modelopt-gpt-oss": ("modelopt-nvfp4", "nvfp4"),
    "compressed-tensors-nvfp4": ("compressed-tensors-nvfp4", "nvfp4"),
    "compressed-tensors-nvfp4a16": ("compressed-tensors-nvfp4", "bf16"),
    "compressed-tensors-mxfp4": ("compressed-tensors-mxfp4", "nvfp4"),
    "kimi-k3": ("compressed-tensors-mxfp4", "bf16"),
    "gpt-oss": ("gpt-oss-mxfp4", "bf16"),
    "gpt-oss-original": ("gpt-oss-mxfp4", "bf16"),
    "deepseek-v4": ("deepseek-v4-fp4", "bf16"),
    "deepseek-v4-nvfp4": ("deepseek-v4-nvfp4", "nvfp4"),
    "deepseek-v4-nvfp4-hf": ("deepseek-v4-nvfp4", "nvfp4"),
    "quark-mxfp4": ("quark-mxfp4", "nvfp4"),
    "quark-nvfp4": ("quark-nvfp4", "nvfp4"),
}


# ---- what is there ----


@pytest.mark.parametrize("form", QUANTIZED)
def test_every_weight_comes_out_as_it_went_in(tiny, form):
    truth = tiny(form)
    checkpoint = open_checkpoint(truth.path)
    assert set(checkpoint.modules) == set(truth.values)
    for name, value in truth.values.items():
        module = checkpoint.modules[name]
        assert module.shape == value.shape[-2:]
        assert module.experts == (value.shape[0] if value.dim() == 3 else None)
        weight = checkpoint.weight(name)
        assert isinstance(weight, Nvfp4Tensor if module.kind == "nvfp4" else Mxfp4Tensor)
        assert_same_bits(weight.dequantize(), value, name)


@pytest.mark.parametrize("form", QUANTIZED)
def test_the_format_is_named_and_a_clean_checkpoint_gives_no_warning(tiny, form):
    checkpoint = open_checkpoint(tiny(form).path)
    experts = [m for name, m in checkpoint.modules.items() if "mtp" not in name]
    assert (checkpoint.format.name, {m.compute for m in experts}) == (FOUND[form][0], {FOUND[form][1]})
    silent = form != "gpt-oss-original"  # OpenAI's own files have no config
    assert checkpoint.errors == [] and bool(checkpoint.warnings) != silent


@pytest.mark.parametrize("form", QUANTIZED)
def test_plain_tensors_are_the_rest(tiny, form):
    truth = tiny(form)
    checkpoint = open_checkpoint(truth.path)
    plain = set(checkpoint.plain())
    owned = {t for m in checkpoint.modules.values() for t in m.tensors.values()}
    assert plain | owned == set(truth.tensors) and not plain & owned
    for name in plain:
        assert_same_bits(checkpoint.shards[name], truth.tensors[name], name)
    assert any("norm" in n for n in plain) and not any(n.endswith("weight_scale_2") for n in plain)


def test_an_unquantized_checkpoint_opens_and_has_no_modules(tiny):
    checkpoint = open_checkpoint(tiny("bf16").path)
    assert checkpoint.format.name == "unquantized" and not checkpoint.modules


def test_mixed_checkpoints_are_read_tensor_by_tensor(tiny):
    checkpoint = open_checkpoint(tiny("deepseek-v4-nvfp4").path)
    assert checkpoint.modules["layers.0.ffn.experts.0.w1"].kind == "nvfp4"
    assert checkpoint.modules["mtp.0.ffn.experts.0.w1"].kind == "mxfp4"
    assert checkpoint.modules["mtp.0.ffn.experts.0.w1"].compute == "bf16"
    assert "layers.0.ffn.shared_experts.w1" not in checkpoint.modules  # FP8


# ---- MoE blocks ----


@pytest.mark.parametrize("form", [f for f in QUANTIZED if f != "modelopt-awq"])
def test_moe_blocks_come_stacked_gate_before_up(tiny, form):
    truth = tiny(form)
    checkpoint = open_checkpoint(truth.path)
    assert list(checkpoint.moe_layers()) == truth.moe
    for prefix in truth.moe:
        moe = checkpoint.moe(prefix)
        gate, up, down = expected_experts(truth, prefix, interleaved="oss" in form)
        w13 = up if gate is None else torch.cat([gate, up], 1)
        assert_same_bits(moe.w13.dequantize(), w13, f"{prefix} w13")
        assert_same_bits(moe.up.dequantize(), up, f"{prefix} up")
        assert gate is None or assert_same_bits(moe.gate.dequantize(), gate, f"{prefix} gate") is None
        assert_same_bits(moe.down.dequantize(), down, f"{prefix} down")
        assert moe.gated == (gate is not None)


def expected_experts(truth, prefix, interleaved):
    stacked = [f"{prefix}.experts.gate_up_proj", f"{prefix}.mlp1_weight"]
    for name in stacked:
        if name in truth.values:
            w13, other = truth.values[name], name.replace("gate_up", "down").replace("mlp1", "mlp2")
            halves = (w13[:, 0::2], w13[:, 1::2]) if interleaved else w13.chunk(2, 1)
            return (*halves, truth.values[other])
    for names in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        if f"{prefix}.experts.0.{names[1]}" in truth.values:
            gates = names[0] if f"{prefix}.experts.0.{names[0]}" in truth.values else None
            return tuple(
                n and torch.stack([truth.values[f"{prefix}.experts.{e}.{n}"] for e in range(4)])
                for n in (gates, names[1], names[2])
            )
    raise AssertionError(prefix)


@pytest.mark.parametrize("form", ["gpt-oss", "gpt-oss-original", "modelopt-gpt-oss"])
def test_biases_go_with_their_rows(tiny, form):
    truth = tiny(form)
    prefix = truth.moe[1]
    hf = ("experts.gate_up_proj_bias", "experts.down_proj_bias")
    names = ("mlp1_bias", "mlp2_bias") if "original" in form else hf
    gate_up, down = (truth.tensors[f"{prefix}.{n}"].float() for n in names)
    gate, up, got_down = open_checkpoint(truth.path).moe(prefix).biases()
    assert_same_bits(gate.contiguous(), gate_up[:, 0::2].contiguous())
    assert_same_bits(up.contiguous(), gate_up[:, 1::2].contiguous())
    assert_same_bits(got_down, down)


def test_gate_and_up_keep_their_own_alphas(tiny):
    moe = open_checkpoint(tiny("modelopt").path).moe("model.layers.0.mlp")
    assert moe.w13.alpha.shape == (4, 2)
    ratio = moe.w13.alpha[:, 1] / moe.w13.alpha[:, 0]
    assert ((ratio > 1.5) & (ratio < 6)).all()  # up was made three times as large


@pytest.mark.parametrize("form", ["modelopt", "gpt-oss", "modelopt-llama4", "modelopt-nemotron"])
def test_some_experts_of_a_block_are_those_rows_of_the_whole(tiny, form):
    checkpoint = open_checkpoint(tiny(form).path)
    prefix = next(iter(checkpoint.moe_layers()))
    whole, part = checkpoint.moe(prefix), checkpoint.moe(prefix, range(1, 3))
    assert part.first_expert == 1
    assert_same_bits(part.w13.dequantize(), whole.w13.dequantize()[1:3])
    assert_same_bits(part.down.dequantize(), whole.down.dequantize()[1:3])
    for p, w in zip(part.biases() or (), whole.biases() or (), strict=True):
        assert_same_bits(p.contiguous(), w[1:3].contiguous())


def test_one_expert_of_a_stacked_module_is_read_alone(tiny):
    for form in ("gpt-oss", "modelopt-llama4"):
        checkpoint = open_checkpoint(tiny(form).path)
        name = next(n for n, m in checkpoint.modules.items() if m.experts)
        whole = checkpoint.weight(name).dequantize()
        assert_same_bits(checkpoint.weight(name, experts=2).dequantize(), whole[2])
        assert_same_bits(checkpoint.weight(name, experts=slice(1, 3)).dequantize(), whole[1:3])
    with pytest.raises(CheckpointError, match="not stacked"):
        open_checkpoint(tiny("modelopt").path).weight("model.layers.0.mlp.experts.0.up_proj", experts=1)


def test_routers_come_with_the_bias_they_have(tiny):
    def moe(form, layer):
        checkpoint = open_checkpoint(tiny(form).path)
        return checkpoint.moe(list(checkpoint.moe_layers())[layer]), tiny(form).tensors

    got, t = moe("gpt-oss", 0)
    assert_same_bits(got.router, t["model.layers.0.mlp.router.weight"])
    assert_same_bits(got.router_bias, t["model.layers.0.mlp.router.bias"])
    got, t = moe("gpt-oss-original", 0)
    assert_same_bits(got.router_bias, t["block.0.mlp.gate.bias"])
    assert got.selection_bias is None
    got, t = moe("deepseek-v4", 0)  # looks its experts up by token
    assert_same_bits(got.expert_of_token, t["layers.0.ffn.gate.tid2eid"])
    assert got.selection_bias is None
    got, t = moe("deepseek-v4", 1)
    assert_same_bits(got.selection_bias, t["layers.1.ffn.gate.bias"])
    got, t = moe("modelopt-minimax", 0)
    assert_same_bits(got.selection_bias, t["model.layers.0.block_sparse_moe.e_score_correction_bias"])


@pytest.mark.parametrize(
    "form", ["modelopt", "compressed-tensors-nvfp4", "gpt-oss", "deepseek-v4", "modelopt-nemotron"]
)
def test_a_layer_loaded_from_a_checkpoint_computes_with_its_weights(tiny, form):
    checkpoint = open_checkpoint(tiny(form).path)
    moe = checkpoint.moe(next(iter(checkpoint.moe_layers()))).to_nvfp4()
    act = {"gpt-oss": "swiglu_oai", "modelopt-nemotron": "relu2"}.get(form, "silu")
    E, H, I = moe.w2.shape[0], moe.w2.shape[1], moe.w2.shape[2]
    router = Router(H, E, 2, bias=moe.router_bias is not None)
    router.weight.copy_(moe.router)
    if moe.router_bias is not None:
        router.bias.copy_(moe.router_bias)
    layer = Nvfp4MoE(
        router, E, H, I, compute="bf16", act=act, act_alpha=1.702, limit=7.0, bias=moe.biases() is not None
    )
    layer.load_weights(moe.gate, moe.up, moe.down)
    if moe.biases() is not None:
        layer.load_biases(*moe.biases())
    x = torch.randn(5, H).bfloat16()
    weights, ids = router(x)
    w13, w2 = (w.dequantize().double() for w in (moe.w13, moe.w2))
    want = torch.zeros(5, H, dtype=torch.float64)
    for t in range(5):
        for j in range(2):
            e = int(ids[t, j])
            h = x[t].double() @ w13[e].T + (0 if moe.w13_bias is None else moe.w13_bias[e].double())
            h = ops.swiglu(h.bfloat16()[None], act, 1.702, 7.0)[0].double()
            y = h @ w2[e].T + (0 if moe.w2_bias is None else moe.w2_bias[e].double())
            want[t] += weights[t, j].double() * y.bfloat16().double()
    assert_close_layers(layer(x), want)


# ---- other conventions ----


def test_divisors_become_multipliers(tiny):
    truth = tiny("compressed-tensors-nvfp4")
    checkpoint = open_checkpoint(truth.path)
    name = "model.layers.0.mlp.experts.0.up_proj"
    divisor = truth.tensors[f"{name}.weight_global_scale"]
    assert divisor > 1 and checkpoint.weight(name).alpha.shape == ()
    assert checkpoint.weight(name).alpha == divisor[0].reciprocal()
    assert checkpoint.input_scale(name) == truth.tensors[f"{name}.input_global_scale"][0].reciprocal()


def test_input_scales_and_pre_quant_scales_are_found(tiny):
    checkpoint = open_checkpoint(tiny("modelopt-awq").path)
    module = checkpoint.modules["model.layers.0.mlp.up_proj"]
    assert module.tensors["pre_quant_scale"].endswith("pre_quant_scale")
    assert checkpoint.shards[module.tensors["pre_quant_scale"]].shape == (module.shape[1],)
    assert checkpoint.input_scale("model.layers.0.mlp.up_proj") == torch.tensor(INPUT_SCALE)
    assert (
        open_checkpoint(tiny("modelopt-w4a16").path).input_scale("model.layers.0.mlp.experts.0.up_proj")
        is None
    )
    stacked = open_checkpoint(tiny("modelopt-llama4").path)
    assert stacked.input_scale("model.layers.0.feed_forward.experts.down_proj").shape == (4,)


def test_awq_scaled_experts_are_not_stacked(tiny, tmp_path):
    truth = tiny("modelopt")
    name = "model.layers.0.mlp.experts.1.up_proj.pre_quant_scale"
    path = remade(truth, tmp_path, **{name: torch.ones(64).bfloat16()})
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.pre_quant_scale"):
        open_checkpoint(path).moe("model.layers.0.mlp")


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
def test_a_scalar_may_have_any_shape_of_one(tiny, tmp_path, shape):
    truth, name = tiny("modelopt"), "model.layers.0.mlp.experts.0.up_proj"
    alpha = truth.tensors[f"{name}.weight_scale_2"].reshape(shape)
    path = remade(truth, tmp_path, **{f"{name}.weight_scale_2": alpha})
    assert_same_bits(open_checkpoint(path).weight(name).dequantize(), truth.values[name])


def test_stacked_modules_may_have_an_alpha_for_each_expert_or_half(tiny, tmp_path):
    truth, name = tiny("modelopt-llama4"), "model.layers.0.feed_forward.experts.gate_up_proj"
    ones = truth.values[name] / truth.tensors[f"{name}_weight_scale_2"].double()
    for shape in ((4,), (4, 1), (4, 2)):
        alpha = torch.rand(shape) + 0.5
        path = remade(truth, tmp_path / str(len(shape)) / str(shape[-1]), **{f"{name}_weight_scale_2": alpha})
        rows = alpha.reshape(4, -1).repeat_interleave(192 // alpha.reshape(4, -1).shape[1], 1)
        got = open_checkpoint(path).weight(name).dequantize()
        torch.testing.assert_close(got, (ones * rows[..., None].double()).float(), rtol=2**-22, atol=0)
        assert open_checkpoint(path).moe("model.layers.0.feed_forward").w13.alpha.shape == (4, 2)


def test_modelopt_with_one_scale_for_32_values_is_read_if_its_config_says_so(tiny, tmp_path):
    truth, name = tiny("modelopt-w4a16"), "model.layers.0.mlp.experts.0.up_proj"
    sf = (
        truth.tensors[f"{name}.weight_scale"].view(torch.uint8)[:, ::2].contiguous().view(torch.float8_e4m3fn)
    )
    exchanged = {f"{name}.weight_scale": sf}
    with pytest.raises(CheckpointError, match="one scale for 32 values belongs to MXFP4"):
        open_checkpoint(remade(truth, tmp_path / "a", **exchanged))
    config = json.loads(json.dumps(truth.config))
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32
    checkpoint = open_checkpoint(remade(truth, tmp_path / "b", config=config, **exchanged))
    assert checkpoint.modules[name].group == 32
    assert_same_bits(
        checkpoint.weight(name).sf.view(torch.uint8), sf.view(torch.uint8).repeat_interleave(2, 1)
    )

"""checkpoint.moe(): blocks that contradict themselves, and requests they cannot meet, are errors, for what
would come out otherwise are wrong numbers."""

import pytest
import torch
from checkpoint_weights import INPUT_SCALE
from checkpoints import remade, write_directory
from compare import assert_same_bits

from nvfp4_moe.checkpoint import CheckpointError, open_checkpoint
from nvfp4_moe.checkpoint.convert import plan_conversion
from nvfp4_moe.diagnostics import check_checkpoint

MOE = "model.layers.0.mlp"
UP = f"{MOE}.experts.0.up_proj"
LLAMA = "model.layers.0.feed_forward.experts.gate_up_proj"
OSS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("form", ["modelopt", "gpt-oss"])
@pytest.mark.parametrize(
    "experts", [range(0), range(2, 9), range(4, 6), range(0, 4, 2), range(3, 1), range(-2, 2)], ids=str
)
def test_experts_that_are_not_there_or_not_in_a_row_are_an_error(tiny, form, experts):
    checkpoint = open_checkpoint(tiny(form).path)
    with pytest.raises(CheckpointError, match=r"experts must be a range within 0 \.\. 4, got range"):
        checkpoint.moe(MOE, experts)


def test_an_expert_of_another_spelling_replaces_none(tiny, tmp_path):
    """experts.01 would have become expert 1."""
    truth, other = tiny("modelopt"), f"{MOE}.experts.01.up_proj"
    more = {f"{other}.{s}": truth.tensors[f"{UP}.{s}"] for s in ("weight", "weight_scale", "weight_scale_2")}
    checkpoint = open_checkpoint(remade(truth, tmp_path, **more))
    assert_same_bits(
        checkpoint.moe(MOE).up.dequantize(), open_checkpoint(truth.path).moe(MOE).up.dequantize()
    )


def test_a_number_of_thousands_of_digits_is_no_expert(tiny, tmp_path):
    truth, other = tiny("modelopt"), f"{MOE}.experts.{'9' * 5000}.up_proj"
    more = {f"{other}.{s}": truth.tensors[f"{UP}.{s}"] for s in ("weight", "weight_scale", "weight_scale_2")}
    path = remade(truth, tmp_path, **more)
    assert list(open_checkpoint(path).moe_layers()) == truth.moe
    check_checkpoint(path)


def test_stacked_beside_single_experts_are_an_error(tiny, tmp_path):
    tensors, stacked = dict(tiny("modelopt").tensors), tiny("modelopt-llama4").tensors
    for suffix in ("", "_weight_scale", "_weight_scale_2"):
        tensors[f"{MOE}.experts.down_proj{suffix}"] = stacked[f"{LLAMA.replace('gate_up', 'down')}{suffix}"]
    write_directory(tmp_path, tensors, tiny("modelopt").config)
    with pytest.raises(CheckpointError, match="some are stacked, some are stored one by one"):
        open_checkpoint(tmp_path).moe(MOE)


def test_a_stacked_block_without_gate_and_up_is_an_error(tiny, tmp_path):
    truth = tiny("gpt-oss")
    path = remade(truth, tmp_path, drop=[f"{OSS}_blocks", f"{OSS}_scales", f"{OSS}_bias"])
    with pytest.raises(CheckpointError, match="gate_up_proj is missing"):
        open_checkpoint(path).moe(MOE)


@pytest.mark.parametrize("form", ["modelopt", "modelopt-nemotron", "gpt-oss"])
def test_sizes_of_gate_up_and_down_fit(form, tiny, tmp_path):
    truth = tiny(form)
    checkpoint = open_checkpoint(truth.path)
    prefix = next(iter(checkpoint.moe_layers()))
    downs = [n for n in checkpoint.modules if n.startswith(prefix) and "down" in n]
    shorter = {}  # all downs without their last 32 values of K, or of E
    for name in downs:
        for role in ("packed", "sf", "e8m0"):
            if tensor := checkpoint.modules[name].tensors.get(role):
                t = truth.tensors[tensor]
                cut = (
                    t[:-1] if "oss" in form else t.view(torch.uint8)[..., : t.shape[-1] * 2 // 3].contiguous()
                )
                shorter[tensor] = cut.view(t.dtype).contiguous()
        if "oss" in form:
            shorter[f"{name}_bias"] = truth.tensors[f"{name}_bias"][:-1]
    with pytest.raises(CheckpointError, match=r"so down must be \["):
        open_checkpoint(remade(truth, tmp_path, **shorter)).moe(prefix)


def test_experts_of_different_kinds_are_an_error(tiny, tmp_path):
    truth, mx = tiny("compressed-tensors-nvfp4"), tiny("compressed-tensors-mxfp4").tensors
    gone = [n for n in truth.tensors if n.startswith(f"{UP}.")]
    path = remade(truth, tmp_path / "a", drop=gone, **{n: mx[n] for n in mx if n.startswith(f"{UP}.")})
    with pytest.raises(CheckpointError, match="experts differ in kind: mxfp4 and nvfp4"):
        open_checkpoint(path).moe(MOE)
    said = truth.config["quantization_config"]
    weights_only = said["config_groups"]["group_0"] | {
        "targets": ["re:.*experts.2"],
        "input_activations": None,
    }
    groups = {"a": weights_only, "b": said["config_groups"]["group_0"]}
    config = truth.config | {"quantization_config": said | {"config_groups": groups}}
    with pytest.raises(CheckpointError, match="experts differ in compute: bf16 and nvfp4"):
        open_checkpoint(remade(truth, tmp_path / "b", config=config)).moe(MOE)


def test_gate_and_up_of_different_sizes_are_an_error(tiny, tmp_path):
    truth, half = tiny("modelopt"), {}
    for e in range(4):
        for role in ("weight", "weight_scale"):
            name = f"{MOE}.experts.{e}.gate_proj.{role}"
            half[name] = (
                truth.tensors[name].view(torch.uint8)[:48].contiguous().view(truth.tensors[name].dtype)
            )
    with pytest.raises(CheckpointError, match=r"gate and up has shape \[96, 64\] and \[48, 64\]"):
        open_checkpoint(remade(truth, tmp_path, **half)).moe(MOE)


def biased(truth, path, parts, but=()):
    sizes = {"gate": 96, "up": 96, "down": 64}
    names = [f"{MOE}.experts.{e}.{p}_proj.bias" for e in range(4) for p in parts]
    return remade(
        truth, path, **{n: torch.randn(sizes[n.split(".")[-2][:-5]]) for n in names if n not in but}
    )


def test_biases_of_single_experts_go_with_their_rows(tiny, tmp_path):
    path = biased(tiny("modelopt"), tmp_path, ("gate", "up", "down"))
    checkpoint = open_checkpoint(path)
    for part, got in zip(("gate", "up", "down"), checkpoint.moe(MOE).biases(), strict=True):
        want = [checkpoint.shards[f"{MOE}.experts.{e}.{part}_proj.bias"] for e in range(4)]
        assert_same_bits(got.contiguous(), torch.stack(want), part)


@pytest.mark.parametrize(
    "parts, but, says",
    [
        (("gate", "up"), (), "gate and up have a bias and down none"),
        (("down",), (), "gate and up have a bias and down none, or the other way"),
        (("gate", "down"), (), "gate has a bias and up none"),
        (("gate", "up", "down"), (f"{MOE}.experts.2.up_proj.bias",), "up: some experts have a bias, some"),
    ],
    ids=str,
)
def test_a_bias_that_would_be_lost_is_an_error(parts, but, says, tiny, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(biased(tiny("modelopt"), tmp_path, parts, but)).moe(MOE)


# ---- scalars ----


@pytest.mark.parametrize("shape", [(2, 4), (8,), (4, 2, 3), (3,), (4, 4)])
def test_alphas_of_another_shape_are_an_error_and_not_taken_as_they_lie(shape, tiny, tmp_path):
    """[2, E] holds as many values as [E, 2], and other experts'."""
    path = remade(tiny("modelopt-llama4"), tmp_path, **{f"{LLAMA}_weight_scale_2": torch.ones(shape)})
    with pytest.raises(CheckpointError, match=r"alpha must be F32 with 1 value, \[4\] or \[4, 2\], got F32"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.ones(2, dtype=torch.int64), torch.ones(1, dtype=torch.float64)], ids=str
)
def test_an_input_scale_of_another_shape_or_type_is_an_error_where_it_is_used(value, tiny, tmp_path):
    path = remade(tiny("modelopt"), tmp_path, **{f"{UP}.input_scale": value})
    checkpoint = open_checkpoint(path)  # which needs none
    assert checkpoint.moe(MOE).w13.shape == (4, 192, 64)
    with pytest.raises(
        CheckpointError, match=r"up_proj\.input_scale must be BF16 or F16 or F32 with 1 value"
    ):
        checkpoint.input_scale(UP)
    with pytest.raises(CheckpointError, match=r"up_proj\.input_scale must be"):
        plan_conversion(path, "modelopt").run(tmp_path / "out")
    found = {f.fault: f.places[0].name for f in check_checkpoint(path).findings}
    assert found["wrong-layout"] == f"{UP}.input_scale"


def test_a_divisor_whose_inverse_is_infinite_is_an_error(tiny, tmp_path):
    tiny_one = {f"{UP}.weight_global_scale": torch.tensor([1e-40])}
    with pytest.raises(CheckpointError, match="weight_global_scale: must be finite and positive"):
        open_checkpoint(remade(tiny("compressed-tensors-nvfp4"), tmp_path, **tiny_one)).weight(UP)


def test_alphas_of_interleaved_halves_go_with_their_rows(tiny, tmp_path):
    """gpt-oss stacked with [E, 2] alphas: rows 0::2 are gate's."""
    truth = tiny("modelopt-gpt-oss")
    plain = open_checkpoint(truth.path).weight(OSS)
    ones = plain.dequantize().double() / plain.alpha[:, None, None].double()
    alpha = torch.rand(4, 2) + 0.5
    checkpoint = open_checkpoint(remade(truth, tmp_path / "in", **{f"{OSS}_weight_scale_2": alpha}))
    with pytest.raises(CheckpointError, match="gate and up are interleaved, each with an alpha"):
        checkpoint.weight(OSS)  # whose alphas are of the first and of the second half
    gate, up = checkpoint.moe(MOE).gate, checkpoint.moe(MOE).up
    for half, (got, rows) in enumerate(((gate, slice(0, None, 2)), (up, slice(1, None, 2)))):
        want = (ones[:, rows] * alpha[:, half, None, None].double()).float()
        torch.testing.assert_close(got.dequantize(), want, rtol=2**-22, atol=0)
    plan_conversion(tmp_path / "in", "modelopt").run(tmp_path / "out")
    again = open_checkpoint(tmp_path / "out").moe(MOE)
    assert_same_bits(again.gate.dequantize(), gate.dequantize())
    assert_same_bits(again.up.dequantize(), up.dequantize())


def test_input_scales_of_halves_go_with_their_halves(tiny, tmp_path):
    truth, scales = tiny("modelopt-llama4"), torch.rand(4, 2) * INPUT_SCALE
    path = remade(truth, tmp_path / "in", **{f"{LLAMA}_input_scale": scales})
    plan_conversion(path, "modelopt").run(tmp_path / "out")
    after = open_checkpoint(tmp_path / "out")
    for e in range(4):
        for half, part in enumerate(("gate", "up")):
            assert (
                after.input_scale(f"model.layers.0.feed_forward.experts.{e}.{part}_proj") == scales[e, half]
            )

"""The real libraries, where they are installed (pip install -e '.[interop]'): their bytes are ours.

safetensors          files both ways, and nothing is read here that it refuses
transformers         the tiny models' names are those its classes save; it loads our checkpoints
compressed-tensors   its compressor's bytes are ours, its decompressor reads ours
nvidia-modelopt      its quantizer's bytes are ours; what it exports is read
"""

import json
import random
import re

import checkpoint_models as models
import checkpoint_weights as weights
import checkpoints
import pytest
import torch
from checkpoints import make, write_directory
from compare import assert_same_bits

from nvfp4_moe import Nvfp4Tensor, formats
from nvfp4_moe.checkpoint import CheckpointError, Shards, ShardWriter, open_checkpoint
from nvfp4_moe.checkpoint.convert import plan_conversion

SIZES = (models.H, models.I, models.E)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def needs(library: str):
    return pytest.importorskip(library, reason=f"{library} is not installed: pip install -e '.[interop]'")


# ---- safetensors ----


def test_safetensors_reads_what_is_written_here(tmp_path):
    safetensors = needs("safetensors.torch")
    tensors = {
        "a": torch.randn(3, 5).bfloat16(), "b": torch.tensor(1.5), "c": torch.zeros(0, 2),
        "d": torch.arange(32, dtype=torch.uint8).view(2, 16).view(torch.float8_e4m3fn),
        "e": torch.arange(5, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "f": torch.arange(8, dtype=torch.uint8).view(2, 4).view(torch.float4_e2m1fn_x2),
        "g": torch.arange(4, dtype=torch.int8),
    }  # fmt: skip
    plan = [(n, t.dtype, (2, 8) if n == "f" else tuple(t.shape)) for n, t in tensors.items()]
    writer = ShardWriter(tmp_path, plan, max_shard_bytes=40)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    read = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        read |= safetensors.load_file(file)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape, name
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), (
            name
        )
    safetensors.save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / "theirs.safetensors").rename(theirs / "model.safetensors")
    shards = Shards(theirs)
    for name, tensor in tensors.items():
        assert torch.equal(
            shards[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name


def test_nothing_is_read_here_that_safetensors_refuses(tmp_path):
    safe_open = needs("safetensors").safe_open
    from test_checkpoint_fuzz import ADVERSARIAL

    for header, data in ADVERSARIAL.values():
        checkpoints.write_raw(tmp_path / "model.safetensors", header, data)
        with pytest.raises(CheckpointError):
            Shards(tmp_path)
    checkpoints.write_file(tmp_path / "model.safetensors", {"a": torch.randn(3), "b": torch.zeros(2, 2)})
    whole, rng, accepted = (tmp_path / "model.safetensors").read_bytes(), random.Random(1), 0
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.choice(b'0123456789{}[],:"U8FI ')
        (tmp_path / "model.safetensors").write_bytes(damaged)
        try:
            Shards(tmp_path)
        except CheckpointError:
            continue
        accepted += 1
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            list(file.keys())
    assert accepted > 200


# ---- transformers ----

REAL_NAMES = [
    models.QWEN3_MOE, models.QWEN3, models.DEEPSEEK_V3, models.MINIMAX_M2, models.NEMOTRON_H, models.LLAMA4,
    models.GPT_OSS, models.DEEPSEEK_V4,
]  # fmt: skip


@pytest.mark.parametrize("model", REAL_NAMES, ids=lambda m: m.config["model_type"])
def test_the_tiny_models_have_the_names_and_shapes_that_transformers_saves(model, tmp_path):
    transformers = needs("transformers")
    config = {k: v for k, v in models.config_of(model, SIZES, 2).items() if k != "model_type"}
    if "scoring_func" in config:
        config["hc_mult"] = 4
    config = transformers.CONFIG_MAPPING[model.config["model_type"]](**config)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    # transformers 5.23 does not undo all its renaming of DeepSeek-V4
    back = {r"^model\.embed_tokens": "embed", r"^model\.hc_head\.hc_": "hc_head_", r"^model\.": ""}
    theirs = {}
    for name, info in Shards(tmp_path).tensors.items():
        for pattern, to in back.items() if model.mtp else ():
            name = re.sub(pattern, to, name)
        theirs[name] = info.shape
    ours = models.rest_of(model, SIZES, 2)
    stacked = model in (models.LLAMA4, models.GPT_OSS)
    for block in models.blocks_of(model, 2):
        if stacked:
            H, I, E = SIZES
            ours[f"{block}.experts.gate_up_proj"] = torch.empty(E, H, 2 * I)  # before they are quantized
            ours[f"{block}.experts.down_proj"] = torch.empty(E, I, H)
            if model is models.GPT_OSS:
                ours[f"{block}.experts.gate_up_proj_bias"] = torch.empty(E, 2 * I)
                ours[f"{block}.experts.down_proj_bias"] = torch.empty(E, H)
        else:
            models.put_experts(ours, {}, block, weights.put_bf16, model.parts)
    ours = {n: tuple(t.shape) for n, t in ours.items() if not n.startswith("mtp.")}
    assert theirs == {n: s for n, s in ours.items() if not (model.mtp and n.endswith(".scale"))}


def test_transformers_reads_our_gpt_oss_as_we_do(tmp_path):
    transformers = needs("transformers")
    make(tmp_path, "gpt-oss", shards=2)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.bfloat16,
        output_loading_info=True,
    )  # fmt: skip
    assert not found["missing_keys"] and not found["unexpected_keys"]
    checkpoint, state = open_checkpoint(tmp_path), model.state_dict()
    for name in checkpoint.modules:
        assert_same_bits(
            state[name].float().transpose(1, 2).contiguous(), checkpoint.weight(name).dequantize(), name
        )


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_transformers_reads_our_compressed_tensors_as_we_do(tmp_path, kind):
    needs("compressed_tensors")
    transformers = needs("transformers")
    put, said = {
        "nvfp4": (weights.put_ct_nvfp4a16, checkpoints.CT_NVFP4A16),
        "mxfp4": (weights.put_ct_mxfp4, checkpoints.CT_MXFP4A16),
    }[kind]
    tensors = models.rest_of(models.QWEN3, SIZES, 2)
    for name in [n.removesuffix(".weight") for n in tensors if ".mlp." in n]:
        put(tensors, name, tensors.pop(f"{name}.weight"))
    config = models.config_of(models.QWEN3, SIZES, 2) | {"quantization_config": said}
    write_directory(tmp_path, tensors, config, shards=2)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )  # fmt: skip
    assert not found["missing_keys"] and not found["unexpected_keys"]
    checkpoint, state = open_checkpoint(tmp_path), model.state_dict()
    assert len(checkpoint.modules) == 6 and checkpoint.format.name == f"compressed-tensors-{kind}"
    for name in checkpoint.modules:
        want = checkpoint.weight(name).dequantize(torch.bfloat16)
        assert_same_bits(state[f"{name}.weight"], want, name)


# ---- compressed-tensors ----


def ct_scheme(group: int, scale_dtype):
    quantization = needs("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", symmetric=True, group_size=group, dynamic=False,
        strategy="tensor_group" if group == 16 else "group", scale_dtype=scale_dtype,
    )  # fmt: skip
    return args, quantization.QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("seed", range(4))
def test_compressed_tensors_compresses_to_our_bytes(seed):
    needs("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    torch.manual_seed(seed)
    w = weights.random_weight(64, 128, size=0.02 * (1 + seed))
    args, scheme = ct_scheme(16, torch.float8_e4m3fn)
    divisor = generate_gparam(w.min(), w.max())
    blocks = w.float().unflatten(-1, (-1, 16))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=divisor)
    theirs = {"weight": w, "weight_scale": scale, "weight_global_scale": divisor}
    theirs = NVFP4PackedCompressor.compress(theirs, scheme)
    packed, sf, _, value = weights.nvfp4(w, scale=divisor.reciprocal().reshape(()))
    assert_same_bits(theirs["weight_packed"], packed)
    assert_same_bits(theirs["weight_scale"], sf)
    ours = {"weight_packed": packed, "weight_scale": sf, "weight_global_scale": divisor}
    back = NVFP4PackedCompressor.decompress(ours, scheme)["weight"]
    assert_same_bits(back.float(), value.to(back.dtype).float())


def test_compressed_tensors_decompresses_our_mxfp4():
    needs("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor

    _, scheme = ct_scheme(32, torch.uint8)
    ours = {}
    value = weights.put_ct_mxfp4(ours, "m", weights.random_weight(64, 96))
    back = MXFP4PackedCompressor.decompress({k.removeprefix("m."): t for k, t in ours.items()}, scheme)
    assert_same_bits(back["weight"].float(), value)


def test_compressed_tensors_own_converter_of_modelopt_gives_our_bytes(tmp_path):
    needs("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter

    truth = make(tmp_path / "modelopt", "modelopt", mismatched=True)
    experts = ModelOptNvfp4Converter(targets=["re:.*experts.*_proj$"])
    theirs = experts.process(dict(truth.tensors))
    plan_conversion(truth.path, "compressed-tensors").run(tmp_path / "ours")
    ours = Shards(tmp_path / "ours")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():  # it leaves scalars [], its own compressor writes [1], as we do
        assert_same_bits(ours[name].reshape(tensor.shape), tensor, name)


@pytest.mark.parametrize("compute", ["nvfp4", "bf16"])
def test_transformers_reads_what_is_renamed_to_compressed_tensors(tmp_path, compute):
    """Tensors, index and config.json are all the converter's."""
    needs("compressed_tensors")
    transformers = needs("transformers")
    put = weights.put_modelopt if compute == "nvfp4" else weights.put_modelopt_w4a16
    said = checkpoints.modelopt_config() if compute == "nvfp4" else checkpoints.W4A16
    tensors, values = models.rest_of(models.QWEN3, SIZES, 2), {}
    for name in [n.removesuffix(".weight") for n in tensors if ".mlp." in n]:
        values[name] = put(tensors, name, tensors.pop(f"{name}.weight"))
    config = models.config_of(models.QWEN3, SIZES, 2) | {"quantization_config": said}
    write_directory(tmp_path / "modelopt", tensors, config)
    plan_conversion(tmp_path / "modelopt", "compressed-tensors").run(tmp_path / "ct", max_shard_bytes=50_000)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", dtype=torch.bfloat16, output_loading_info=True,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )  # fmt: skip
    assert not found["missing_keys"]
    # dequantized, it has no use for these
    assert all(name.endswith(".input_global_scale") for name in found["unexpected_keys"])
    state = model.state_dict()
    for name, value in values.items():
        got = state[f"{name}.weight"].float()
        torch.testing.assert_close(got, value.bfloat16().float(), rtol=2**-7, atol=0)  # alpha is rounded once


# ---- ModelOpt ----


def modelopt(name: str):
    needs("transformers")  # which it needs for its exporter
    return needs(f"modelopt.torch.{name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_modelopt_quantizes_to_our_bytes_and_reads_ours(dtype):
    theirs = modelopt("quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    w = (torch.randn(96, 128) * torch.exp(torch.randn(96, 1))).to(dtype)
    packed, sf, alpha = theirs.quantize(w, 16)
    ours = Nvfp4Tensor.quantize(w)
    assert_same_bits(packed._quantized_data, ours.packed)
    assert_same_bits(sf, ours.sf)
    assert_same_bits(alpha.reshape(()), ours.alpha)
    back = theirs(w.shape, torch.float32, ours.packed).dequantize(
        dtype=torch.float32, scale=ours.sf, double_scale=ours.alpha, block_sizes={-1: 16}
    )
    # it multiplies the two scales first: one rounding more than ours
    torch.testing.assert_close(back, ours.dequantize(), rtol=2**-23, atol=0)


def test_the_golden_vector_of_modelopt():
    """modelopt 0.47.0, NVFP4QTensor.quantize, run once and written down."""
    x = [0, 0.1, -0.2, 0.3, -0.4, 0.5, 0.75, -1, 1.25, 1.5, -1.75, 2, 2.5, -3, 5, -7]
    w = Nvfp4Tensor.quantize(torch.tensor([x]))
    assert w.packed.flatten().tolist() == list(bytes.fromhex("001819a1323bd4f6"))
    assert w.sf.view(torch.uint8).item() == 0x7E and w.alpha == torch.tensor(7 / 2688)


@pytest.mark.parametrize("recipe", ["NVFP4_DEFAULT_CFG", "NVFP4_MLP_WEIGHT_ONLY_CFG"])
def test_what_modelopt_exports_is_read(tmp_path, recipe):
    """A tiny Qwen3-MoE, calibrated and exported by nvidia-modelopt; the second has a scale for 32 values."""
    mtq, export = modelopt("quantization"), modelopt("export")
    transformers = needs("transformers")
    config = models.config_of(models.QWEN3_MOE, SIZES, 2)
    config = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING["qwen3_moe"](**config))
    model = model.bfloat16().eval()
    model.save_pretrained(tmp_path / "bf16")
    source = Shards(tmp_path / "bf16")

    def calibrate(model):
        model(torch.randint(0, models.VOCAB, (4, 16)))

    with torch.no_grad():
        quantized = mtq.quantize(model, getattr(mtq, recipe), calibrate)
        export.export_hf_checkpoint(quantized, torch.bfloat16, export_dir=tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format.name == "modelopt-nvfp4" and checkpoint.warnings == []
    only = recipe == "NVFP4_MLP_WEIGHT_ONLY_CFG"
    assert {m.compute for m in checkpoint.modules.values()} == {"bf16" if only else "nvfp4"}
    assert {m.group for m in checkpoint.modules.values()} == {32 if only else 16}
    assert len(checkpoint.modules) == (24 if only else 32)
    for name in checkpoint.modules:
        weight, w = checkpoint.weight(name), source[f"{name}.weight"]
        group = checkpoint.modules[name].group
        amax = w.float().unflatten(-1, (-1, group)).abs().amax(-1)
        sf = formats.e4m3_encode((amax / (6 * weight.alpha)).clamp(2**-9, 448))
        step = sf.float() * weight.alpha
        codes = formats.e2m1_encode(w.float() / step.repeat_interleave(group, -1))
        assert_same_bits(
            weight.sf, sf.view(torch.uint8).repeat_interleave(group // 16, -1).view(sf.dtype), name
        )
        same = (formats.unpack(weight.packed) & 7) == (codes & 7)
        assert same.float().mean() > 0.999, name  # they scale in another order: ties may fall differently
    moe = checkpoint.moe("model.layers.0.mlp")
    assert_same_bits(
        moe.w13.alpha[:, 0].contiguous(), moe.w13.alpha[:, 1].contiguous()
    )  # ModelOpt makes them equal
    assert json.loads((tmp_path / "out/hf_quant_config.json").read_text())["producer"]["name"] == "modelopt"

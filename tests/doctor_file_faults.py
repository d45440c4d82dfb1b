"""Planted faults of files, names and configs; the rest of doctor_faults.py."""

import json

import torch
from doctor_faults import DOWN, EXPERT, GATE, INDEX, MLA, plant


def edit(path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ---- files


@plant("unreadable", "{path}", on_disk=True)
def _(path):
    file = next(path.glob("*-00002-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


@plant("unreadable", "{path}", on_disk=True)
def _(path):
    next(path.glob("*-00001-*.safetensors")).unlink()


@plant("index-names", "model.norm.weight", on_disk=True)
def _(path):
    edit(path / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))


@plant("index-names", "ghost.weight", on_disk=True)
def _(path):
    edit(
        path / INDEX, lambda i: i["weight_map"].update({"ghost.weight": i["weight_map"]["model.norm.weight"]})
    )


@plant("index-lacks-scales", f"{DOWN}.weight_scale_2", on_disk=True)
def _(path):
    edit(path / INDEX, lambda index: index["weight_map"].pop(f"{DOWN}.weight_scale_2"))


@plant("index-size", "{path}", on_disk=True)
def _(path):
    edit(path / INDEX, lambda index: index["metadata"].update(total_size=17))


# ---- names and shapes


@plant("missing-tensor", DOWN)
def _(t, config):
    del t[f"{DOWN}.weight_scale_2"]


@plant("missing-tensor", f"{DOWN}.weight")
def _(t, config):
    for role in ("weight_scale", "weight_scale_2"):
        del t[f"{DOWN}.{role}"]


@plant("missing-tensor", f"{DOWN}.weight_scale")
def _(t, config):
    del t[f"{DOWN}.weight"]


@plant("missing-tensor", "model.layers.0.mlp.up_proj", form="modelopt-awq")
def _(t, config):
    del t["model.layers.0.mlp.up_proj.pre_quant_scale"]


@plant("extra-tensor", f"{DOWN}.weight_zero_point")
def _(t, config):
    t[f"{DOWN}.weight_zero_point"] = torch.zeros(64, 6, dtype=torch.uint8)


@plant("excluded-quantized", GATE)
def _(t, config):
    config["quantization_config"]["ignore"].append("*experts.1.gate_proj")


@plant("not-quantized", DOWN)
def _(t, config):
    for role in ("weight_scale", "weight_scale_2", "input_scale"):
        del t[f"{DOWN}.{role}"]
    t[f"{DOWN}.weight"] = torch.randn(64, 96).bfloat16()


@plant("not-quantized", "self_attn.q_proj", form="compressed-tensors-nvfp4", also={"config-ignore"})
def _(t, config):
    config["quantization_config"]["ignore"] = ["lm_head", "re:.*(k|v|o)_proj$", "re:.*mlp.gate$"]


@plant("expert-count", "model.layers.0.mlp.experts")
def _(t, config):
    config["num_experts"] = 5


@plant("expert-count", "model.layers.0.mlp.experts")
def _(t, config):
    for name in [name for name in t if name.startswith(EXPERT + ".")]:
        del t[name]


@plant("expert-count", "model.layers.0.mlp.experts", says="3 of 4, missing 3")
def _(t, config):
    for name in [name for name in t if name.startswith("model.layers.0.mlp.experts.3.")]:
        del t[name]


@plant("expert-count", "model.layers.0.mlp.experts", says="4 of 3")
def _(t, config):
    config["num_experts"] = 3


@plant("expert-count", "model.layers.0.mlp.experts", says="missing 1")
def _(t, config):
    for name in [name for name in t if name.startswith(EXPERT + ".")]:
        t[name.replace("experts.1.", "experts.9.")] = t.pop(name)


@plant("expert-count", "gate_up_proj", form="gpt-oss")
def _(t, config):
    config["num_local_experts"] = 8


@plant("expert-parts", EXPERT)  # a shared expert under a routed expert's name
def _(t, config):
    for name in [name for name in t if name.startswith(DOWN + ".")]:
        del t[name]


@plant("expert-parts", EXPERT, says="no gate")  # half of the layer's experts: the layer still has gates
def _(t, config):
    for name in [name for name in t if name.startswith("model.layers.0.") and "gate_proj" in name]:
        if ".experts.1." in name or ".experts.2." in name:
            del t[name]


@plant("refused", "{path}")
def _(t, config):
    t[f"{DOWN}.comfy_quant"] = torch.zeros(8, dtype=torch.uint8)


@plant("wrong-layout", DOWN)  # scales padded to whole atoms of the interleaved layout
def _(t, config):
    t[f"{DOWN}.weight_scale"] = torch.zeros(128, 8, dtype=torch.uint8).view(torch.float8_e4m3fn)


@plant("wrong-layout", f"{DOWN}.weight_scale", also={"missing-tensor"})
def _(t, config):
    t[f"{DOWN}.weight_scale"] = t[f"{DOWN}.weight_scale"].half()


@plant("wrong-layout", DOWN)  # one scale for 32 values under NVFP4's names
def _(t, config):
    t[f"{DOWN}.weight_scale"] = t[f"{DOWN}.weight_scale"][:, ::2].contiguous()


# ---- KV cache


@plant("kv-odd", "layers.0.self_attn.v_proj.v_scale")
def _(t, config):
    t["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.03)
    t["model.layers.0.self_attn.v_proj.v_scale"] = torch.tensor(1.0)


@plant("kv-bad", f"{MLA}.k_scale")
def _(t, config):
    t[f"{MLA}.k_scale"], t[f"{MLA}.v_scale"] = torch.tensor([float("nan")]), torch.tensor([0.1])


@plant("kv-names", "{path}")
def _(t, config):
    for name in ("layers.0.self_attn.k_proj.k_scale", "layers.0.self_attn.v_proj.v_scale"):
        t[f"model.{name}"] = torch.tensor(0.03)
    t["model.layers.1.self_attn.k_scale"] = t["model.layers.1.self_attn.v_scale"] = torch.tensor(0.03)


@plant("kv-names", f"{MLA}")
def _(t, config):
    t[f"{MLA}.k_proj.k_scale"] = torch.tensor(0.03)


# ---- config


@plant("config-missing", "{path}", on_disk=True)
def _(path):
    edit(path / "config.json", lambda config: config.pop("quantization_config"))
    (path / "hf_quant_config.json").unlink()


@plant("config-legacy", "{path}", on_disk=True)
def _(path):
    edit(path / "config.json", lambda config: config.pop("quantization_config"))


@plant("config-method", "{path}", also={"config-group"})
def _(t, config):
    config["quantization_config"] |= {"quant_method": "mxfp4"}


@plant("config-case", "{path}")
def _(t, config):
    config["quantization_config"]["quant_algo"] = "nvfp4"


@plant("config-group", "{path}", form="deepseek-v4-nvfp4", also={"config-ignore"})
def _(t, config):
    config["quantization_config"]["group_size"] = 128


@plant("config-pattern", "re:(gate+)+", says="a repeat within a repeat")
def _(t, config):
    config["quantization_config"]["ignore"].append("re:(gate+)+")


@plant("config-ignore", "*mlp.gaet")
def _(t, config):
    config["quantization_config"]["ignore"].append("*mlp.gaet")

"""A checkpoint with one fault planted, for each fault the doctor knows.

Each plant names what the doctor must say: the place, and which other faults the same damage shows as.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints
import torch
from checkpoint_weights import nvfp4
from torch import Tensor

from nvfp4_moe import formats

EXPERT = "model.layers.0.mlp.experts.1"
GATE, UP, DOWN = (f"{EXPERT}.{part}_proj" for part in ("gate", "up", "down"))
V4 = "layers.1.ffn.experts.2"
OSS = "model.layers.1.mlp.experts"
MLA = "model.layers.1.self_attn"
INDEX = "model.safetensors.index.json"


@dataclass
class Plant:
    fault: str
    form: str
    place: str  # a part of the name that the first place must have; {path}: the directory
    damage: Callable  # (tensors, config) or, with on_disk, (path)
    also: frozenset = frozenset()
    on_disk: bool = False
    says: str = ""  # a part of the first place's detail
    options: dict = field(default_factory=dict)  # of check_checkpoint

    def make(self, path: Path) -> None:
        truth = checkpoints.make(path, self.form, shards=2)
        if self.on_disk:
            return self.damage(path)
        tensors, config = dict(truth.tensors), json.loads(json.dumps(truth.config))
        tensors |= {name: t.clone() for name, t in tensors.items()}
        self.damage(tensors, config)
        checkpoints.write_directory(path, tensors, config, shards=2)


PLANTS: list[Plant] = []


def plant(fault: str, place: str, form: str = "modelopt", also=(), on_disk=False, says="", **options):
    def keep(damage):
        PLANTS.append(Plant(fault, form, place, damage, frozenset(also), on_disk, says, options))
        return damage

    return keep


def bits(t: dict, name: str) -> Tensor:
    return t[name].view(torch.uint8)


def requantize(t: dict, module: str, factor: float, w: Tensor | None = None) -> None:
    """The module quantized again under `factor` times the right global scale."""
    w = (
        torch.randn(t[f"{module}.weight"].shape[0], 2 * t[f"{module}.weight"].shape[1]) * 0.02
        if w is None
        else w
    )
    packed, sf, alpha, _ = nvfp4(w, w.abs().amax() * factor)
    t |= {f"{module}.weight": packed, f"{module}.weight_scale": sf, f"{module}.weight_scale_2": alpha}


# ---- block scales


@plant("nan-scale", f"{UP}.weight_scale", says="1 of 384, the first at [3, 1]")
def _(t, config):
    bits(t, f"{UP}.weight_scale")[3, 1] = 0x7F


@plant("nan-scale", f"{OSS}.down_proj_weight_scale[2]", form="modelopt-gpt-oss", says="[5, 1]")
def _(t, config):
    bits(t, f"{OSS}.down_proj_weight_scale")[2, 1, 5] = 0xFF


@plant("negative-scale", f"{DOWN}.weight_scale", says="at [5, 2]")
def _(t, config):
    bits(t, f"{DOWN}.weight_scale")[5, 2] |= 0x80


@plant("saturated", f"{DOWN}.weight_scale")
def _(t, config):
    requantize(t, DOWN, 1 / 1.5)


@plant("low-scales", f"{DOWN}.weight_scale")
def _(t, config):
    requantize(t, DOWN, 4)


@plant("tiny-scales", f"{DOWN}.weight_scale")
def _(t, config):
    requantize(t, DOWN, 2.0**13)


@plant("lost-blocks", f"{DOWN}.weight_scale", says="at [7, 3]")
def _(t, config):
    bits(t, f"{DOWN}.weight_scale")[7, 3] = 0


@plant("pinned-blocks", f"{DOWN}.weight_scale", also={"folds-badly"})
def _(t, config):
    w = torch.randn(64, 96) * 1e-4
    w[9, 9] = 300  # the outlier
    requantize(t, DOWN, 1, w)


@plant("ct-eighth", f"{DOWN}.weight_scale", form="compressed-tensors-nvfp4")
def _(t, config):
    sf = bits(t, f"{DOWN}.weight_scale")
    sf[0, 0], sf[0, 1], t[f"{DOWN}.weight_packed"][0, :8] = 0x20, 0x02, 0


# ---- global scales


@plant("bad-global", f"{DOWN}.weight_scale_2")
def _(t, config):
    t[f"{DOWN}.weight_scale_2"] = torch.tensor(float("inf"))


@plant("bad-global", f"{DOWN}.weight_scale_2")
def _(t, config):
    t[f"{DOWN}.weight_scale_2"] = torch.tensor(1e-40)


@plant("bad-global", f"{OSS}.down_proj_weight_scale_2[0]", form="modelopt-gpt-oss")
def _(t, config):
    t[f"{OSS}.down_proj_weight_scale_2"] = torch.tensor(-1.0)


@plant("odd-global", f"{DOWN}.weight_scale_2", also={"folds-badly"})
def _(t, config):
    t[f"{DOWN}.weight_scale_2"] = torch.tensor(1e-12)


@plant("inverted-global", f"{DOWN}.weight_scale_2", also={"folds-badly"})
def _(t, config):
    t[f"{DOWN}.weight_scale_2"] = t[f"{DOWN}.weight_scale_2"].reciprocal()


@plant(
    "inverted-global", f"{DOWN}.weight_global_scale", form="compressed-tensors-nvfp4", also={"folds-badly"}
)
def _(t, config):
    t[f"{DOWN}.weight_global_scale"] = t[f"{DOWN}.weight_global_scale"].reciprocal()


@plant("gate-up-differ", f"{UP}.weight_scale_2")
def _(t, config):
    t[f"{UP}.weight_scale_2"] *= 1.1


@plant("gate-up-far", f"{UP}.weight_scale_2", also={"folds-badly"})
def _(t, config):
    t[f"{UP}.weight_scale_2"] *= 0.1


@plant("gate-up-differ", f"{OSS}.gate_up_proj_weight_scale_2[2]", form="modelopt-gpt-oss")
def _(t, config):
    pairs = t[f"{OSS}.gate_up_proj_weight_scale_2"].expand(4, 2).clone()
    pairs[2, 1] *= 1.1
    t[f"{OSS}.gate_up_proj_weight_scale_2"] = pairs


@plant("qkv-differ", f"{MLA}.q_a_proj.weight_scale_2", form="deepseek-v4-nvfp4-hf", also={"config-ignore"})
def _(t, config):
    for role in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        t[f"{MLA}.kv_proj.{role}"] = t[f"{MLA}.q_a_proj.{role}"].clone()
    t[f"{MLA}.kv_proj.weight_scale_2"] *= 1.2


@plant("folds-badly", DOWN)
def _(t, config):
    requantize(t, DOWN, 1, torch.randn(64, 96) * 5e-4)


# ---- input scales


@plant("input-scale-missing", DOWN)
def _(t, config):
    del t[f"{DOWN}.input_scale"]


@plant("input-scale-missing", "model.layers.", also={"input-scale-same"})
def _(t, config):
    for name in [name for name in t if name.endswith("input_scale")]:
        del t[name]


@plant("input-scale-missing", "model.layers.", form="compressed-tensors-nvfp4")
def _(t, config):  # whose "dynamic": "local" means a static one for the tensor
    for name in [name for name in t if name.endswith("input_global_scale")]:
        del t[name]


@plant("input-scale-bad", f"{DOWN}.input_scale")
def _(t, config):
    t[f"{DOWN}.input_scale"] = torch.tensor(0.0)


@plant("input-scale-sentinel", f"{DOWN}.input_scale")
def _(t, config):
    t[f"{DOWN}.input_scale"] = torch.tensor(1 / 448)


@plant("input-scale-sentinel", f"{DOWN}.input_global_scale", form="compressed-tensors-nvfp4")
def _(t, config):
    t[f"{DOWN}.input_global_scale"] = torch.tensor([2688 / 0.5])


@plant("input-scale-same", "model.layers.0.mlp.experts.*.gate_proj")
def _(t, config):
    pass  # the tiny checkpoints have one input scale for all


@plant("input-scale-pair", f"{UP}.input_scale")
def _(t, config):
    t[f"{UP}.input_scale"] *= 1.5


@plant("input-scale-spread", f"{DOWN}.input_scale")
def _(t, config):
    t[f"{DOWN}.input_scale"] *= 1e-5


@plant("activation-above", DOWN, activations={DOWN: 3.0 * 1.7, UP: 3.0})
def _(t, config):
    pass


@plant("activation-far-above", DOWN, activations={DOWN: 3.0 * 16})
def _(t, config):
    pass


# ---- codes


@plant("dead-weight", f"{DOWN}.weight")
def _(t, config):
    t[f"{DOWN}.weight"] &= 0x88


@plant("dead-weight", f"{V4}.w2.weight", form="deepseek-v4")
def _(t, config):
    t[f"{V4}.w2.weight"] *= 0


@plant("one-scale", f"{DOWN}.weight_scale", also={"folds-badly"})
def _(t, config):
    bits(t, f"{DOWN}.weight_scale").fill_(0x38)


@plant("codes-unused", f"{DOWN}.weight")
def _(t, config):
    codes = formats.unpack(t[f"{DOWN}.weight"])
    t[f"{DOWN}.weight"] = formats.pack(codes & 8 | (codes & 7).clamp(max=5))


# ---- MXFP4 exponents


@plant("e8m0-nan", f"{V4}.w1.scale", form="deepseek-v4", says="at [4, 1]")
def _(t, config):
    bits(t, f"{V4}.w1.scale")[4, 1] = 255


@plant("e8m0-nan-zero", f"{V4}.w1.scale", form="deepseek-v4", says="at [4, 1]")
def _(t, config):
    t[f"{V4}.w1.weight"][4, 16:32] = 0
    bits(t, f"{V4}.w1.scale")[4, 1] = 255


@plant("e8m0-zero-byte", f"{OSS}.down_proj_scales[3]", form="gpt-oss", also={"e8m0-spread"}, says="at [2, 1]")
def _(t, config):
    t[f"{OSS}.down_proj_scales"][3, 2, 1] = 0


@plant("e8m0-stray", f"{OSS}.down_proj_scales[3]", form="gpt-oss")
def _(t, config):
    t[f"{OSS}.down_proj_blocks"][3, 2, 1] = 0
    t[f"{OSS}.down_proj_scales"][3, 2, 1] = 150


@plant("e8m0-spread", f"{V4}.w1.scale", form="deepseek-v4", also={"e8m0-pair-spread"})
def _(t, config):
    bits(t, f"{V4}.w1.scale")[4, 1] -= 18


@plant("e8m0-pair-spread", f"{V4}.w3.scale", form="deepseek-v4")
def _(t, config):
    bits(t, f"{V4}.w1.scale").add_(18)

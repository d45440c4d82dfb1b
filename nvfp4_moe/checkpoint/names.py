"""What the names of modules say: experts and their parts, what engines multiply at once, what is linear."""

import re
from collections.abc import Mapping

PART = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
# Six digits: no model has a million experts, and a name may hold thousands. No leading zero: 01 is not 1.
NUMBER = "0|[1-9][0-9]{0,5}"
EXPERT = re.compile(rf"(.+)\.experts\.({NUMBER})\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
WITHIN_EXPERT = re.compile(rf"\.experts\.({NUMBER})\.")
STACKED = re.compile(r"(.+)\.experts\.(gate_up_proj|down_proj)|(.+)\.(mlp1_weight|mlp2_weight)")

GATE_UP = (("gate_proj", "up_proj"), ("w1", "w3"))
QKV = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa", "kv_proj"))
FUSED_WITH = {name: names for names in GATE_UP + QKV for name in names}

# Matrices that no FP4 exporter takes for a linear layer: embeddings, heads, norms, routers, convolutions, and
# what projects to a handful of numbers. By the last part of the name.
_NOT_LINEAR = re.compile(
    r"\w*emb\w*|wte|wpe|relative_attention_bias|(lm_)?head|output|\w*norm\w*|gate|router|shared_expert_gate"
    r"|classifier|score|weights_proj|conv\w*|dt_proj|x_proj"
)


def is_linear(module: str) -> bool:
    """Of a module with a matrix [N, K]: whether it is a linear layer that may be in FP4."""
    return not _NOT_LINEAR.fullmatch(module.rpartition(".")[2])


def fused_groups(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Modules {name: (N, K)} that share an alpha, in the order of GATE_UP and QKV; all are in one group."""
    groups: dict[tuple, list[str]] = {}
    for name, (_, K) in shapes.items():
        parent, _, last = name.rpartition(".")
        key = (parent, FUSED_WITH[last], K) if last in FUSED_WITH else (name,)
        groups.setdefault(key, []).append(name)
    for key, group in groups.items():
        if len(key) == 3:
            group.sort(key=lambda name: key[1].index(name.rpartition(".")[2]))
    return list(groups.values())


def starred(name: str) -> str:
    """model.layers.3.mlp -> model.layers.*.mlp"""
    return ".".join("*" if _is_number(part) else part for part in name.split("."))


def natural(name: str) -> list:
    """A sort key under which layers.2 comes before layers.10."""
    parts = name.split(".")
    return [(True, int(part), "") if _is_number(part) else (False, 0, part) for part in parts]


def _is_number(part: str) -> bool:
    return re.fullmatch(NUMBER, part) is not None

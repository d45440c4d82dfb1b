"""Tiny models with the tensor names of the real ones, and how their experts are stored.

The tables are what transformers' own classes save for the configs beside them (test_checkpoint_interop.py
holds the two together); DeepSeek-V4's stands under the names DeepSeek published, and its FP8 weights have a
`.scale` more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from checkpoint_weights import fp8_128, random_weight
from torch import Tensor

H, I, E, LAYERS, VOCAB = 64, 96, 4, 2, 128  # small, and no two alike

ATTENTION = """
{a}.q_proj.weight H H
{a}.k_proj.weight H H
{a}.v_proj.weight H H
{a}.o_proj.weight H H
"""
NORMS = """
model.layers.{i}.input_layernorm.weight H
model.layers.{i}.post_attention_layernorm.weight H
"""
ENDS = """
model.embed_tokens.weight V H
model.norm.weight H
lm_head.weight V H
"""
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}


@dataclass(frozen=True)
class Model:
    config: dict
    table: str  # a tensor a line: name, shape, and `first` or `rest` if not every layer has it
    moe: str  # the MoE block
    parts: tuple[str | None, str, str] = ("gate_proj", "up_proj", "down_proj")
    dense_layers: int = 0  # layers without a MoE block, at the start
    fp8: tuple[str, ...] = ()  # weights that are FP8 with a .scale, if their name has one of these
    mtp: bool = False  # one more block, mtp.0, like a layer


QWEN3_MOE = Model(
    {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "mlp_only_layers": [],
        "decoder_sparse_step": 1, "norm_topk_prob": True, "hidden_act": "silu", **HEADS,
    },
    ENDS + NORMS + ATTENTION.replace("{a}", "model.layers.{i}.self_attn") + """
model.layers.{i}.self_attn.q_norm.weight 32
model.layers.{i}.self_attn.k_norm.weight 32
model.layers.{i}.mlp.gate.weight E H
""",
    "model.layers.{i}.mlp",
)  # fmt: skip
QWEN3 = Model(
    {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", **HEADS},
    QWEN3_MOE.table.replace("model.layers.{i}.mlp.gate.weight E H", """
model.layers.{i}.mlp.gate_proj.weight I H
model.layers.{i}.mlp.up_proj.weight I H
model.layers.{i}.mlp.down_proj.weight H I
"""),
    "", dense_layers=99,
)  # fmt: skip
DEEPSEEK_V3 = Model(
    {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 1,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 32, "n_group": 1, "topk_group": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "n_shared_experts": 1,
    },
    ENDS + NORMS + """
model.layers.{i}.self_attn.q_a_proj.weight 32 H
model.layers.{i}.self_attn.q_a_layernorm.weight 32
model.layers.{i}.self_attn.q_b_proj.weight 64 32
model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight 48 H
model.layers.{i}.self_attn.kv_a_layernorm.weight 32
model.layers.{i}.self_attn.kv_b_proj.weight 96 32
model.layers.{i}.self_attn.o_proj.weight H 64
model.layers.{i}.mlp.gate_proj.weight I H first
model.layers.{i}.mlp.up_proj.weight I H first
model.layers.{i}.mlp.down_proj.weight H I first
model.layers.{i}.mlp.gate.weight E H rest
model.layers.{i}.mlp.gate.e_score_correction_bias E rest
model.layers.{i}.mlp.shared_experts.gate_proj.weight I H rest
model.layers.{i}.mlp.shared_experts.up_proj.weight I H rest
model.layers.{i}.mlp.shared_experts.down_proj.weight H I rest
""",
    "model.layers.{i}.mlp", dense_layers=1,
)  # fmt: skip
MINIMAX_M2 = Model(
    {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", **HEADS},
    ENDS + NORMS + ATTENTION.replace("{a}", "model.layers.{i}.self_attn") + """
model.layers.{i}.self_attn.q_norm.weight H
model.layers.{i}.self_attn.k_norm.weight H
model.layers.{i}.block_sparse_moe.gate.weight E H
model.layers.{i}.block_sparse_moe.e_score_correction_bias E
""",
    "model.layers.{i}.block_sparse_moe", ("w1", "w3", "w2"),
)  # fmt: skip
NEMOTRON_H = Model(
    {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "n_group": 1, "topk_group": 1,
        "mlp_hidden_act": "relu2", **HEADS,
    },
    """
backbone.embeddings.weight V H
backbone.norm_f.weight H
lm_head.weight V H
backbone.layers.{i}.norm.weight H
backbone.layers.{i}.mixer.gate.weight E H
backbone.layers.{i}.mixer.gate.e_score_correction_bias E
backbone.layers.{i}.mixer.shared_experts.up_proj.weight I H
backbone.layers.{i}.mixer.shared_experts.down_proj.weight H I
""",
    "backbone.layers.{i}.mixer", (None, "up_proj", "down_proj"),
)  # fmt: skip
LLAMA4 = Model(
    {
        "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "interleave_moe_layer_step": 1,
        **HEADS,
    },
    ENDS + NORMS + ATTENTION.replace("{a}", "model.layers.{i}.self_attn") + """
model.layers.{i}.feed_forward.router.weight E H
model.layers.{i}.feed_forward.shared_expert.gate_proj.weight I H
model.layers.{i}.feed_forward.shared_expert.up_proj.weight I H
model.layers.{i}.feed_forward.shared_expert.down_proj.weight H I
""",
    "model.layers.{i}.feed_forward",
)  # fmt: skip
GPT_OSS = Model(
    {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "swiglu_limit": 7.0, **HEADS},
    ENDS + NORMS + ATTENTION.replace("{a}", "model.layers.{i}.self_attn") + """
model.layers.{i}.self_attn.q_proj.bias H
model.layers.{i}.self_attn.k_proj.bias H
model.layers.{i}.self_attn.v_proj.bias H
model.layers.{i}.self_attn.o_proj.bias H
model.layers.{i}.self_attn.sinks 2
model.layers.{i}.mlp.router.weight E H
model.layers.{i}.mlp.router.bias E
""",
    "model.layers.{i}.mlp",
)  # fmt: skip
GPT_OSS_ORIGINAL = Model(
    {},
    """
embedding.weight V H
unembedding.weight V H
norm.scale H
block.{i}.attn.norm.scale H
block.{i}.attn.qkv.weight 192 H
block.{i}.attn.qkv.bias 192
block.{i}.attn.out.weight H H
block.{i}.attn.out.bias H
block.{i}.attn.sinks 2
block.{i}.mlp.norm.scale H
block.{i}.mlp.gate.weight E H
block.{i}.mlp.gate.bias E
""",
    "block.{i}.mlp",
)
DEEPSEEK_V4 = Model(
    {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "num_hash_layers": 1,
        "head_dim": 32, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 32, "n_shared_experts": 1,
        "num_attention_heads": 2, "index_n_heads": 2, "index_head_dim": 16, "swiglu_limit": 10.0,
        "scoring_func": "sqrtsoftplus", "layer_types": ["sliding_attention"] * LAYERS,
        "partial_rotary_factor": 0.5,
    },
    """
embed.weight V H
norm.weight H
head.weight V H
hc_head_fn 4 256
hc_head_base 4
hc_head_scale 1
layers.{i}.attn.wq_a.weight 32 H
layers.{i}.attn.q_norm.weight 32
layers.{i}.attn.wq_b.weight 64 32
layers.{i}.attn.wkv.weight 32 H
layers.{i}.attn.norm.weight 32
layers.{i}.attn.attn_sink 2
layers.{i}.attn.wo_a.weight 64 32
layers.{i}.attn.wo_b.weight H 64
layers.{i}.attn_norm.weight H
layers.{i}.ffn_norm.weight H
layers.{i}.hc_attn_fn 24 256
layers.{i}.hc_attn_base 24
layers.{i}.hc_attn_scale 3
layers.{i}.hc_ffn_fn 24 256
layers.{i}.hc_ffn_base 24
layers.{i}.hc_ffn_scale 3
layers.{i}.ffn.gate.weight E H
layers.{i}.ffn.gate.tid2eid V 2 first
layers.{i}.ffn.gate.bias E rest
layers.{i}.ffn.shared_experts.w1.weight I H
layers.{i}.ffn.shared_experts.w2.weight H I
layers.{i}.ffn.shared_experts.w3.weight I H
""",
    "layers.{i}.ffn", ("w1", "w3", "w2"), mtp=True,
    fp8=("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "shared_experts"),
)  # fmt: skip


def config_of(model: Model, sizes: tuple[int, int, int], layers: int) -> dict:
    """With every model family's name for the same numbers."""
    hidden, inter, experts = sizes
    counts = {
        "qwen3_moe": ("num_experts",), "gpt_oss": ("num_local_experts",),
        "llama4_text": ("num_local_experts",),
        "minimax_m2": ("num_local_experts",), "qwen3": (),
    }.get(model.config.get("model_type"), ("n_routed_experts",))  # fmt: skip
    config = model.config | {
        "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers, "vocab_size": VOCAB,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "num_experts_per_tok": 2,
    }  # fmt: skip
    if counts and model.config["model_type"] not in ("gpt_oss", "minimax_m2", "llama4_text"):
        config["moe_intermediate_size"] = inter
    if config.get("model_type") == "nemotron_h":
        config |= {"layers_block_type": ["moe"] * layers, "moe_shared_expert_intermediate_size": inter}
    return config | dict.fromkeys(counts, experts)


def rest_of(model: Model, sizes: tuple[int, int, int], layers: int) -> dict[str, Tensor]:
    """Everything but the routed experts."""
    symbols = dict(zip("HIE", sizes, strict=True)) | {"V": VOCAB}
    tensors = {}
    for line in filter(None, model.table.splitlines()):
        name, *shape = line.split()
        which = shape.pop() if shape[-1] in ("first", "rest") else ""
        shape = [symbols[s] if s in symbols else int(s) for s in shape]
        names = [name.format(i=i) for i in range(layers)] if "{i}" in name else [name]
        names = {"first": names[:1], "rest": names[1:], "": names}[which]
        if model.mtp and name.startswith("layers.{i}") and which != "first":
            names.append(name.replace("layers.{i}", "mtp.0"))
        for name in names:
            _put(tensors, model, name, shape)
    return tensors


def _put(tensors: dict, model: Model, name: str, shape: list[int]) -> None:
    if name.endswith("tid2eid"):
        tensors[name] = torch.randint(0, 4, shape)
    elif any(f".{part}." in name for part in model.fp8):
        tensors[name], tensors[name.replace(".weight", ".scale")] = fp8_128(random_weight(*shape))
    elif "norm" in name:
        tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
    else:
        tensors[name] = random_weight(*shape)


def blocks_of(model: Model, layers: int) -> list[str]:
    names = [model.moe.format(i=i) for i in range(model.dense_layers, layers)]
    return names + (["mtp.0.ffn"] if model.mtp else [])


def expert_weights(sizes, mismatched: bool):
    """gate, up [I, H], down [H, I] bf16 of every expert, sizes that differ between experts; and the amax gate
    and up share (None if each has its own)."""
    hidden, inter, experts = sizes
    for e in range(experts):
        size = 0.02 * (1 + e % 8)
        gate, up = random_weight(inter, hidden, size=size), random_weight(inter, hidden, size=size)
        up = up * 3 if mismatched else up
        amax = None if mismatched else torch.maximum(gate.abs().amax(), up.abs().amax())
        yield (gate, up, random_weight(hidden, inter, size=size)), amax


def put_experts(
    t: dict, values: dict, block: str, put: Callable, parts, mismatched=False, sizes=(H, I, E)
) -> None:
    """Experts one by one; parts = (gate or None, up, down)."""
    for e, (weights, amax) in enumerate(expert_weights(sizes, mismatched)):
        for name, w, shared in zip(parts, weights, (amax, amax, None), strict=True):
            if name is not None:
                module = f"{block}.experts.{e}.{name}"
                values[module] = put(t, module, w, shared)


def put_stacked(
    t: dict, values: dict, put: Callable, names: tuple[str, str], interleaved: bool, sizes
) -> None:
    """Experts in two tensors, gate_up [E, 2I, H] and down [E, H, I], under `names`."""
    gates, ups, downs = (
        torch.stack(ws) for ws in zip(*(w for w, _ in expert_weights(sizes, False)), strict=True)
    )
    gate_up = torch.stack([gates, ups], 2).flatten(1, 2) if interleaved else torch.cat([gates, ups], 1)
    for name, w in zip(names, (gate_up, downs), strict=True):
        values[name] = put(t, name, w)

"""Tiny models with the tensor names of the real ones: (tensors, config, values, MoE prefixes)."""

import torch
from checkpoint_weights import fp8_128, mxfp4, put_deepseek, random_weight
from torch import Tensor

H, I, E, LAYERS, VOCAB = 64, 96, 4, 2, 128  # small, and no two alike


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def put_experts(t: dict, truth: dict, prefix: str, put, names, mismatched=False, sizes=(H, I, E)) -> None:
    """names: (gate or None, up, down)."""
    hidden, inter, experts = sizes
    for e in range(experts):
        size = 0.02 * (1 + e)
        gate, up = random_weight(inter, hidden, size=size), random_weight(inter, hidden, size=size)
        up = up * 3 if mismatched else up
        shared = None if mismatched else torch.maximum(gate.abs().amax(), up.abs().amax())
        down = random_weight(hidden, inter, size=size)
        for name, w, amax in zip(names, (gate, up, down), (shared, shared, None), strict=True):
            if name is not None:
                module = f"{prefix}.experts.{e}.{name}"
                truth[module] = put(t, module, w, amax)


def put_attention(t: dict, prefix: str, hidden: int = H, bias: bool = False) -> None:
    for proj in ("q_proj", "k_proj", "v_proj", "o_proj"):
        t[f"{prefix}.{proj}.weight"] = random_weight(hidden, hidden)
        if bias:
            t[f"{prefix}.{proj}.bias"] = random_weight(hidden)


def qwen3_moe(put, mismatched=False, sizes=(H, I, E), layers=LAYERS):
    hidden, inter, experts = sizes
    t, values = {"model.embed_tokens.weight": random_weight(VOCAB, hidden)}, {}
    prefixes = [f"model.layers.{i}.mlp" for i in range(layers)]
    for i, mlp in enumerate(prefixes):
        base = f"model.layers.{i}"
        put_attention(t, f"{base}.self_attn", hidden)
        head = ones(hidden // 2)
        t |= {f"{base}.self_attn.q_norm.weight": head, f"{base}.self_attn.k_norm.weight": head.clone()}
        t[f"{mlp}.gate.weight"] = random_weight(experts, hidden)
        put_experts(t, values, mlp, put, ("gate_proj", "up_proj", "down_proj"), mismatched, sizes)
        norm = ones(hidden)
        t |= {f"{base}.input_layernorm.weight": norm, f"{base}.post_attention_layernorm.weight": norm.clone()}
    t["model.norm.weight"] = ones(hidden)
    t["lm_head.weight"] = random_weight(VOCAB, hidden)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden,
        "moe_intermediate_size": inter, "intermediate_size": inter, "num_experts": experts,
        "num_experts_per_tok": 2, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": hidden // 2, "vocab_size": VOCAB, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu", "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
    }  # fmt: skip
    return t, config, values, prefixes


def deepseek_v4(put, put_mtp=put_deepseek, mismatched=False, sizes=(H, I, E), layers=LAYERS):
    hidden, inter, experts = sizes
    t, values = {"embed.weight": random_weight(VOCAB, hidden)}, {}
    prefixes = [f"layers.{i}.ffn" for i in range(layers)] + ["mtp.0.ffn"]
    for ffn in prefixes:
        base = ffn.removesuffix(".ffn")
        for proj in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
            name = f"{base}.attn.{proj}"
            t[f"{name}.weight"], t[f"{name}.scale"] = fp8_128(random_weight(hidden, hidden))
        t[f"{base}.attn_norm.weight"] = ones(hidden)
        t[f"{base}.ffn_norm.weight"] = ones(hidden)
        t[f"{ffn}.gate.weight"], t[f"{ffn}.gate.bias"] = random_weight(experts, hidden), torch.randn(experts)
        for proj, shape in (("w1", (inter, hidden)), ("w2", (hidden, inter)), ("w3", (inter, hidden))):
            name = f"{ffn}.shared_experts.{proj}"
            t[f"{name}.weight"], t[f"{name}.scale"] = fp8_128(random_weight(*shape))
        way = put_mtp if base.startswith("mtp") else put
        put_experts(t, values, ffn, way, ("w1", "w3", "w2"), mismatched, sizes)
    t |= {"norm.weight": ones(hidden), "head.weight": random_weight(VOCAB, hidden)}
    config = {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "hidden_size": hidden,
        "moe_intermediate_size": inter, "n_routed_experts": experts, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "num_hidden_layers": layers, "num_nextn_predict_layers": 1,
        "vocab_size": VOCAB, "expert_dtype": "fp4", "swiglu_limit": 10.0, "scoring_func": "sqrtsoftplus",
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }  # fmt: skip
    return t, config, values, prefixes


def gpt_oss(original=False, sizes=(H, I, E), layers=LAYERS):
    hidden, inter, experts = sizes
    t, values = {}, {}
    base = "block" if original else "model.layers"
    t["embedding.weight" if original else "model.embed_tokens.weight"] = random_weight(VOCAB, hidden)
    prefixes = [f"{base}.{i}.mlp" for i in range(layers)]
    for i, mlp in enumerate(prefixes):
        if original:
            names, suffixes = ("mlp1_weight", "mlp2_weight"), (".blocks", ".scales")
            biases = (f"{mlp}.mlp1_bias", f"{mlp}.mlp2_bias")
            t[f"{mlp}.gate.weight"], t[f"{mlp}.gate.bias"] = (
                random_weight(experts, hidden),
                random_weight(experts),
            )
            t |= {f"{base}.{i}.attn.qkv.weight": random_weight(3 * hidden, hidden)}
        else:
            names, suffixes = ("experts.gate_up_proj", "experts.down_proj"), ("_blocks", "_scales")
            biases = tuple(f"{mlp}.{n}_bias" for n in names)
            t[f"{mlp}.router.weight"] = random_weight(experts, hidden)
            t[f"{mlp}.router.bias"] = random_weight(experts)
            put_attention(t, f"{base}.{i}.self_attn", hidden, bias=True)
            t[f"{base}.{i}.self_attn.sinks"] = random_weight(2)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                t[f"{base}.{i}.{norm}.weight"] = ones(hidden)
        for name, bias, shape in zip(names, biases, ((2 * inter, hidden), (hidden, inter)), strict=True):
            size = torch.arange(1, experts + 1)[:, None, None]
            packed, e8m0, value = mxfp4(random_weight(experts, *shape) * size)
            t[f"{mlp}.{name}{suffixes[0]}"] = packed.unflatten(-1, (-1, 16))
            t[f"{mlp}.{name}{suffixes[1]}"] = e8m0
            t[bias] = random_weight(experts, shape[0])
            values[f"{mlp}.{name}"] = value
    t["norm.scale" if original else "model.norm.weight"] = ones(hidden)
    t["unembedding.weight" if original else "lm_head.weight"] = random_weight(VOCAB, hidden)
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": hidden,
        "intermediate_size": inter, "num_local_experts": experts, "num_experts_per_tok": 2,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": hidden // 2, "vocab_size": VOCAB, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        },
    }  # fmt: skip
    return t, config, values, prefixes

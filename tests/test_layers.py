"""Layers: any size, own alphas for fused shards, round trips, and close to their float modules."""

import copy

import pytest
import torch
from compare import assert_same_bits, relative_rms
from torch import nn

from nvfp4_moe import Nvfp4GroupedLinear, Nvfp4Linear, Nvfp4MoE, Nvfp4Tensor, Router, SharedExpert, ops
from nvfp4_moe.layers.weights import pad_k

# NVFP4 weights err by 9.5 % relative RMS on Gaussian data, activations by as much again, independently: 13.5
# % a GEMM
WEIGHTS_ONLY, BOTH = 0.11, 0.15


class Expert(nn.Module):
    def __init__(self, hidden, intermediate):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class FloatMoE(nn.Module):
    """A Qwen-style block, in plain torch."""

    def __init__(self, hidden=96, intermediate=80, experts=6, top_k=2, shared=False):
        super().__init__()
        self.top_k, self.norm_topk_prob = top_k, True
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, intermediate) for _ in range(experts))
        self.shared_expert = Expert(hidden, intermediate) if shared else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if shared else None

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, ids = self.gate(tokens).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.stack(
            [
                sum(w * self.experts[e](t) for w, e in zip(ws, es, strict=True))
                for t, ws, es in zip(tokens, weights, ids, strict=True)
            ]
        )
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        return y.reshape(x.shape)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("K, N", [(64, 32), (50, 30), (1, 1), (100, 257)], ids=str)
@pytest.mark.parametrize("compute", ops.COMPUTES)
class TestNvfp4Linear:
    def test_is_the_float_layer_of_its_dequantized_weight(self, K, N, compute):
        linear = nn.Linear(K, N)
        layer = Nvfp4Linear.from_float(linear, compute=compute)
        x = torch.randn(3, 5, K).bfloat16()
        w = Nvfp4Tensor.quantize(linear.weight).dequantize()[:, :K]
        want = x.float() @ w.T + linear.bias
        got = layer(x)
        assert got.shape == (3, 5, N) and got.dtype == torch.bfloat16
        # bf16: one rounding, 2^-9 each value; nvfp4: the activations' own 9.5 %
        assert relative_rms(got, want) < (2.0**-8 if compute == "bf16" else WEIGHTS_ONLY)

    def test_state_dict_round_trip(self, K, N, compute):
        layer = Nvfp4Linear.from_float(nn.Linear(K, N), compute=compute)
        twin = Nvfp4Linear(K, N, bias=True, compute=compute)
        twin.load_state_dict(layer.state_dict())
        x = torch.randn(4, K).bfloat16()
        assert_same_bits(twin(x), layer(x))


def test_fused_shards_keep_their_own_alphas():
    small, large = nn.Linear(64, 24), nn.Linear(64, 40)
    large.weight.mul_(50)
    fused = Nvfp4Linear.from_float(small, large, compute="bf16")
    x = torch.randn(6, 64).bfloat16()
    parts = [Nvfp4Linear.from_float(m, compute="bf16")(x) for m in (small, large)]
    assert_same_bits(fused(x), torch.cat(parts, -1))


def test_loading_shards_of_the_wrong_size_says_so():
    with pytest.raises(
        ValueError, match=r"Nvfp4Linear: the shards' rows must have shape \[8, 8\], got \[8, 9\]"
    ):
        Nvfp4Linear(16, [8, 8]).load_weights(*(Nvfp4Tensor.quantize(torch.randn(n, 16)) for n in (8, 9)))


@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("groups, K, N", [(4, 64, 32), (3, 50, 17)], ids=str)
def test_grouped_linear_is_one_linear_a_block(groups, K, N, compute):
    w = torch.randn(groups, N, K) * torch.tensor([1.0, 10, 0.1, 3])[:groups, None, None]
    layer = Nvfp4GroupedLinear.from_float(w.flatten(0, 1), groups, compute=compute)
    x = torch.randn(2, 5, groups, K).bfloat16()
    got = layer(x)
    assert got.shape == (2, 5, groups, N)
    for g in range(groups):
        one = Nvfp4Linear.from_float(_linear(w[g]), compute=compute)
        assert_same_bits(got[:, :, g], one(x[:, :, g]))


def _linear(w):
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.copy_(w)
    return linear


class TestRouter:
    def test_takes_both_kinds_of_bias(self):
        gate = nn.Linear(32, 8)
        gate.e_score_correction_bias = nn.Parameter(torch.randn(8))
        router = Router.from_float(gate, 3, score="sigmoid", n_group=2, topk_group=1, scale=2.5)
        x = torch.randn(5, 32).bfloat16()
        want = ops.route(
            gate(x.float()), gate.e_score_correction_bias.detach(), 3, "sigmoid", 2, 1, True, 2.5
        )
        assert_same_bits(router(x), want)

    def test_state_dict_round_trip(self):
        router = Router.from_float(nn.Linear(32, 8), 2)
        twin = Router(32, 8, 2, bias=True)
        twin.load_state_dict(router.state_dict())
        x = torch.randn(5, 32)
        assert_same_bits(twin(x), router(x))


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "routed+shared"])
@pytest.mark.parametrize("hidden, intermediate", [(96, 80), (50, 33)], ids=str)
@pytest.mark.parametrize("compute", ops.COMPUTES)
class TestNvfp4MoE:
    def test_is_close_to_the_float_block(self, hidden, intermediate, shared, compute):
        block = FloatMoE(hidden, intermediate, shared=shared)
        layer = Nvfp4MoE.from_float(block, compute=compute)
        x = torch.randn(2, 40, hidden).bfloat16()
        got = layer(x)
        assert got.shape == x.shape
        # gate, up and down: the errors of three factors add in squares, and silu passes up to 1.1 times its
        # input's
        assert (
            relative_rms(got, block(x.float())) < (WEIGHTS_ONLY if compute == "bf16" else BOTH) * 1.1 * 3**0.5
        )

    def test_state_dict_round_trip_and_deepcopy(self, hidden, intermediate, shared, compute):
        layer = Nvfp4MoE.from_float(FloatMoE(hidden, intermediate, shared=shared), compute=compute)
        x = torch.randn(7, hidden).bfloat16()
        want = layer(x)
        twin = Nvfp4MoE.from_float(FloatMoE(hidden, intermediate, shared=shared), compute=compute)
        twin.load_state_dict(layer.state_dict())
        assert_same_bits(twin(x), want)
        assert_same_bits(copy.deepcopy(layer)(x), want)


def test_gate_and_up_keep_alphas_far_apart():
    block = FloatMoE()
    for expert in block.experts:
        expert.up_proj.weight.mul_(20)
        expert.down_proj.weight.div_(20)
    layer = Nvfp4MoE.from_float(block, compute="bf16")
    ratio = layer.w13_alpha[:, 1] / layer.w13_alpha[:, 0]
    assert bool((ratio > 15).all())
    x = torch.randn(30, 96)
    assert relative_rms(layer(x.bfloat16()), block(x)) < WEIGHTS_ONLY * 3**0.5


def test_takes_experts_stacked_as_transformers_holds_them():
    block = FloatMoE()
    want = Nvfp4MoE.from_float(block)
    stacked = nn.Module()
    stacked.gate_up_proj = nn.Parameter(
        torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in block.experts])
    )
    stacked.down_proj = nn.Parameter(torch.stack([e.down_proj.weight for e in block.experts]))
    block.experts = stacked
    x = torch.randn(9, 96).bfloat16()
    assert_same_bits(Nvfp4MoE.from_float(block)(x), want(x))


def test_biases_and_clamped_activation_follow_the_formula():
    """gpt-oss: biases on both GEMMs, swiglu_oai."""
    E, H, I = 4, 64, 48
    gate, up, down = torch.randn(E, I, H), torch.randn(E, I, H), torch.randn(E, H, I)
    b_gate, b_up, b_down = torch.randn(E, I), torch.randn(E, I), torch.randn(E, H)
    router = Router.from_float(nn.Linear(H, E), 2)
    layer = Nvfp4MoE(router, E, H, I, compute="bf16", act="swiglu_oai", act_alpha=1.702, limit=7.0, bias=True)
    q = [Nvfp4Tensor.quantize(w) for w in (gate, up, down)]
    layer.load_weights(*q).load_biases(b_gate, b_up, b_down)
    x = torch.randn(11, H).bfloat16()
    got = layer(x)
    gate, up, down = (t.dequantize() for t in q)
    weights, ids = router(x)
    want = torch.zeros(11, H)
    for t in range(11):
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            g = (gate[e] @ x[t].float() + b_gate[e]).clamp(max=7)
            u = (up[e] @ x[t].float() + b_up[e]).clamp(-7, 7)
            want[t] += w * (down[e] @ (g * torch.sigmoid(1.702 * g) * (u + 1)) + b_down[e])
    assert relative_rms(got, want) < 2.0**-7  # BF16 at four places


def test_relu2_experts_have_no_gate():
    E, H, I = 3, 32, 64
    up, down = (Nvfp4Tensor.quantize(torch.randn(E, I, H)), Nvfp4Tensor.quantize(torch.randn(E, H, I)))
    layer = Nvfp4MoE(
        Router.from_float(nn.Linear(H, E), 1), E, H, I, act="relu2", compute="bf16"
    ).load_weights(None, up, down)
    assert layer.w13.shape == (E, I, H // 2) and layer.w13_alpha.shape == (E,)
    x = torch.randn(5, H).bfloat16()
    weights, ids = layer.router(x)
    u, d = up.dequantize(), down.dequantize()
    want = torch.stack(
        [
            w[0] * (d[e[0]] @ torch.relu(u[e[0]] @ v.float()) ** 2)
            for v, w, e in zip(x, weights, ids, strict=True)
        ]
    )
    assert relative_rms(layer(x), want) < 2.0**-7
    with pytest.raises(ValueError, match="act=relu2 takes 1 of gate and up, got 2"):
        layer.load_weights(up, up, down)


def test_moe_layer_with_shared_expert_compiles_without_a_graph_break():
    layer = Nvfp4MoE.from_float(FloatMoE(shared=True))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 96).bfloat16()
    assert_same_bits(compiled(x), layer(x))


def test_moe_layer_compiles_with_inductor():
    layer = Nvfp4MoE.from_float(FloatMoE())
    x = torch.randn(9, 96).bfloat16()
    got = torch.compile(layer, fullgraph=True)(x)
    assert relative_rms(got, layer(x)) < 2.0**-8  # inductor may fuse the gate GEMM's casts


def test_layers_hold_buffers_only_and_build_on_meta():
    layer = Nvfp4MoE(Router(96, 4, 2, device="meta"), 4, 96, 80, device="meta")
    assert not list(layer.parameters()) and all(b.is_meta for b in layer.buffers())
    real = Nvfp4MoE.from_float(FloatMoE(experts=4))
    layer.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(3, 96).bfloat16()
    assert_same_bits(layer(x), real(x))
    assert pad_k(33) == 64


def test_shared_expert_without_gate_names_what_is_missing():
    with pytest.raises(ValueError, match="Linear has neither gate_proj"):
        SharedExpert.from_float(nn.Linear(3, 3))

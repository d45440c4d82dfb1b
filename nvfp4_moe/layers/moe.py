"""Nvfp4MoE: router, experts in NVFP4, shared expert."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .. import ops
from ..formats import BLOCK
from ..tensor import Nvfp4Tensor
from .linear import Nvfp4Linear, expect_shape, float_weight
from .router import Router
from .weights import Nvfp4Weights, pad_k


class SharedExpert(nn.Module):
    """The dense gated MLP every token passes: two Nvfp4Linear and an activation, optionally behind a sigmoid
    gate."""

    def __init__(
        self,
        gate_up: Nvfp4Linear,
        down: Nvfp4Linear,
        act="silu",
        act_alpha=1.0,
        limit=0.0,
        gate: Tensor | None = None,
    ):
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.act, self.act_alpha, self.limit = act, act_alpha, limit
        self.register_buffer("gate", gate)  # [1, H]: Qwen's shared_expert_gate

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        compute="nvfp4",
        method="amax",
        act="silu",
        act_alpha=1.0,
        limit=0.0,
        gate=None,
    ) -> "SharedExpert":
        """From a module with gate_proj, up_proj and down_proj (or w1, w3, w2), each an nn.Linear."""
        w1, w3, w2 = expert_projections(module)
        up = [w3] if w1 is None else [w1, w3]
        gate = None if gate is None else float_weight(gate)
        return cls(
            Nvfp4Linear.from_float(*up, compute=compute, method=method),
            Nvfp4Linear.from_float(w2, compute=compute, method=method),
            act, act_alpha, limit, gate,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(ops.swiglu(self.gate_up(x), self.act, self.act_alpha, self.limit))
        return y if self.gate is None else y * torch.sigmoid(x @ self.gate.T.to(x.dtype))


def expert_projections(module: nn.Module):
    """(gate, up, down) of one expert under any of its usual names; gate is None for a non-gated one."""
    for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        if hasattr(module, up) and hasattr(module, down):
            return getattr(module, gate, None), getattr(module, up), getattr(module, down)
    raise ValueError(f"{type(module).__name__} has neither gate_proj, up_proj, down_proj nor w1, w3, w2")


def expert_weights(experts: nn.Module) -> tuple[Tensor | None, Tensor, Tensor]:
    """(gate [E, I, H] or None, up [E, I, H], down [E, H, I]) of a ModuleList of experts, or of a module that
    holds them stacked: gate_up_proj [E, 2I, H] (gate rows first) and down_proj [E, H, I], as transformers
    does."""
    if hasattr(experts, "gate_up_proj"):
        gate, up = float_weight(experts.gate_up_proj).chunk(2, 1)
        return gate, up, float_weight(experts.down_proj)
    parts = [expert_projections(e) for e in experts]
    gates, ups, downs = zip(*parts, strict=True)
    gate = None if gates[0] is None else torch.stack([float_weight(w) for w in gates])
    return (gate, torch.stack([float_weight(w) for w in ups]), torch.stack([float_weight(w) for w in downs]))


class Nvfp4MoE(Nvfp4Weights):
    """x [.., H] bf16 -> [.., H]: routed experts first_expert .. first_expert + num_experts, plus a shared
    one.

    w13 holds gate rows then up rows, each half with its own alpha; act "relu2" has no gate. compute: "nvfp4"
    quantizes activations as well, "bf16" only the weights. Biases are float32 (gpt-oss). pack_() swaps the
    routed experts for Hopper's own order; the shared one has layers of its own.
    """

    def __init__(
        self,
        router: nn.Module,
        num_experts: int,
        hidden: int,
        intermediate: int,
        shared: nn.Module | None = None,
        compute: str = "nvfp4",
        act: str = "silu",
        act_alpha: float = 1.0,
        limit: float = 0.0,
        bias: bool = False,
        first_expert: int = 0,
        device=None,
    ):
        super().__init__()
        self.router, self.shared = router, shared
        self.hidden, self.intermediate, self.first_expert = hidden, intermediate, first_expert
        self.compute, self.act, self.act_alpha, self.limit = compute, act, act_alpha, limit
        self.halves = 1 if act == "relu2" else 2
        H, I = pad_k(hidden), pad_k(intermediate)
        alphas = (2,) if self.halves == 2 else ()
        self.hold("w13", (num_experts,), self.halves * I, H, alphas, device)
        self.hold("w2", (num_experts,), H, I, (), device)
        w13_bias = torch.zeros(num_experts, self.halves * I, device=device) if bias else None
        self.register_buffer("w13_bias", w13_bias)
        self.register_buffer("w2_bias", torch.zeros(num_experts, H, device=device) if bias else None)

    def load_weights(self, gate: Nvfp4Tensor | None, up: Nvfp4Tensor, down: Nvfp4Tensor) -> "Nvfp4MoE":
        """gate, up [E, I, H] and down [E, H, I], alphas [E]; gate is None for relu2."""
        E, (_, H, I) = len(self.w2), self.weight_shapes["w2"]
        parts = [up] if gate is None else [gate, up]
        if len(parts) != self.halves:
            raise ValueError(f"Nvfp4MoE: act={self.act} takes {self.halves} of gate and up, got {len(parts)}")
        rounded = -(-self.hidden // BLOCK) * BLOCK
        for name, part in zip(("up",) if gate is None else ("gate", "up"), parts, strict=True):
            expect_shape("Nvfp4MoE", name, part.shape, (E, self.intermediate, rounded))
        rounded = -(-self.intermediate // BLOCK) * BLOCK
        expect_shape("Nvfp4MoE", "down", down.shape, (E, self.hidden, rounded))
        for e in range(E):  # an expert at a time: the peak is one expert's copy
            grown = [Nvfp4Tensor(p.packed[e], p.sf[e], p.alpha[e]).padded(I, H) for p in parts]
            sf = torch.cat([g.sf.view(torch.uint8) for g in grown]).view(torch.float8_e4m3fn)
            self.put("w13", Nvfp4Tensor(torch.cat([g.packed for g in grown]), sf, up.alpha[e]), e)
            self.put("w2", Nvfp4Tensor(down.packed[e], down.sf[e], down.alpha[e]).padded(H, I), e)
        self.w13_alpha.copy_(up.alpha if gate is None else torch.stack([gate.alpha, up.alpha], 1))
        self.w2_alpha.copy_(down.alpha)
        return self

    def load_biases(self, gate: Tensor | None, up: Tensor, down: Tensor) -> "Nvfp4MoE":
        """gate, up [E, I] and down [E, H]."""
        I = self.weight_shapes["w2"][2]
        for i, part in enumerate([up] if gate is None else [gate, up]):
            self.w13_bias[:, i * I : i * I + self.intermediate].copy_(part)
        self.w2_bias[:, : self.hidden].copy_(down)
        return self

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        top_k: int | None = None,
        compute: str = "nvfp4",
        method: str = "amax",
        act: str = "silu",
        act_alpha: float = 1.0,
        limit: float = 0.0,
        **routing,
    ) -> "Nvfp4MoE":
        """Quantize a float MoE block: `gate` (a Linear), `experts`, and, if it has one, `shared_expert(s)`.

        `routing` goes to Router (score, n_group, topk_group, renormalize, scale); top_k and renormalize
        default to the module's own top_k and norm_topk_prob."""
        top_k = top_k or module.top_k
        routing.setdefault("renormalize", getattr(module, "norm_topk_prob", True))
        gate, up, down = expert_weights(module.experts)
        shared = getattr(module, "shared_expert", None) or getattr(module, "shared_experts", None)
        activation = {"act": act, "act_alpha": act_alpha, "limit": limit}
        if shared is not None:
            shared_gate = getattr(module, "shared_expert_gate", None)
            shared = SharedExpert.from_float(shared, compute, method, **activation, gate=shared_gate)
        layer = cls(
            Router.from_float(module.gate, top_k, **routing), len(up), up.shape[2], up.shape[1],
            shared, compute, **activation, device=up.device,
        )  # fmt: skip
        quantized = (None if w is None else Nvfp4Tensor.quantize(w, method) for w in (gate, up, down))
        return layer.load_weights(*quantized)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.hidden)
        weights, ids = self.router(tokens)
        y = ops.moe(
            pad(tokens, (0, self.weight_shapes["w13"][2] - self.hidden)), ids, weights,
            self.w13, self.w13_sf, self.w13_alpha, self.w2, self.w2_sf, self.w2_alpha,
            self.first_expert, self.compute, self.act, self.act_alpha, self.limit,
            self.w13_bias, self.w2_bias,
        )[:, : self.hidden].reshape(x.shape)  # fmt: skip
        return y if self.shared is None else y + self.shared(x)

    def extra_repr(self) -> str:
        size = f"{len(self.w13)} experts from {self.first_expert}, {self.hidden} -> {self.intermediate}"
        return f"{size}, act={self.act}, compute={self.compute}{self.order}"

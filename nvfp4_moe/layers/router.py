"""Router: tokens -> experts and weights."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import ops


class Router(nn.Module):
    """The gate GEMM in float32, then torch.ops.nvfp4.route.

    `weight` [E, H] and `bias` [E] (gpt-oss) make the logits; `selection_bias` [E] (DeepSeek's noaux bias)
    moves the choice of experts and not their weights. score: softmax | sigmoid | sqrt_softplus."""

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        score: str = "softmax",
        n_group: int = 1,
        topk_group: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        selection_bias: bool = False,
        device=None,
    ):
        super().__init__()
        self.top_k, self.score = top_k, score
        self.n_group, self.topk_group = n_group, topk_group
        self.renormalize, self.scale = renormalize, scale
        self.register_buffer("weight", torch.zeros(num_experts, hidden, device=device))
        self.register_buffer("bias", torch.zeros(num_experts, device=device) if bias else None)
        self.register_buffer(
            "selection_bias", torch.zeros(num_experts, device=device) if selection_bias else None
        )

    @classmethod
    def from_float(cls, gate: nn.Linear | nn.Module, top_k: int, **options) -> "Router":
        """From a gate with `weight` [E, H] and, if it has them, `bias` and `e_score_correction_bias` [E]."""
        bias = getattr(gate, "bias", None)
        selection = getattr(gate, "e_score_correction_bias", None)
        E, hidden = gate.weight.shape
        router = cls(
            hidden, E, top_k, bias=bias is not None, selection_bias=selection is not None,
            device=gate.weight.device, **options,
        )  # fmt: skip
        for buffer, source in (
            (router.weight, gate.weight),
            (router.bias, bias),
            (router.selection_bias, selection),
        ):
            if buffer is not None:
                buffer.copy_(source.detach())
        return router

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> weights float32 [T, k], ids int32 [T, k]."""
        logits = linear(x.float(), self.weight, self.bias)
        return ops.route(
            logits, self.selection_bias, self.top_k, self.score,
            self.n_group, self.topk_group, self.renormalize, self.scale,
        )  # fmt: skip

    def extra_repr(self) -> str:
        E, H = self.weight.shape
        return f"{E} experts, top {self.top_k}, hidden={H}, score={self.score}"

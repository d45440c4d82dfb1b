"""Linear layers on NVFP4 weights: dense (one or several fused shards) and block-diagonal."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .. import ops
from ..formats import BLOCK
from ..tensor import Nvfp4Tensor
from .weights import Nvfp4Weights, pad_k, pad_n


def expect_shape(layer: str, what: str, got, wanted) -> None:
    if tuple(got) != tuple(wanted):
        raise ValueError(f"{layer}: {what} must have shape {list(wanted)}, got {list(got)}")


def float_weight(module: nn.Linear | Tensor) -> Tensor:
    return module.weight.detach() if isinstance(module, nn.Module) else module.detach()


class Nvfp4Linear(Nvfp4Weights):
    """y = x W^T + bias for bf16 x [.., in_features]; W in NVFP4.

    Several `out_features` are shards fused into one GEMM (q, k, v or gate, up), each with its own alpha.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        bias: bool = False,
        compute: str = "nvfp4",
        device=None,
    ):
        super().__init__()
        self.shards = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        self.in_features, self.out_features = in_features, sum(self.shards)
        self.compute = compute
        N = pad_n(self.out_features)
        alphas = () if len(self.shards) == 1 else (N,)
        self.hold("weight", (), N, pad_k(in_features), alphas, device)
        self.register_buffer("bias", torch.zeros(N, device=device) if bias else None)

    def load_weights(self, *shards: Nvfp4Tensor, bias: Tensor | None = None) -> "Nvfp4Linear":
        """Copy quantized shards (one for each of `out_features`) and the bias in."""
        expect_shape("Nvfp4Linear", "the shards' rows", [s.shape[0] for s in shards], self.shards)
        _, N, K = self.weight_shapes["weight"]
        for s in shards:
            expect_shape(
                "Nvfp4Linear", "a shard", s.shape, (s.shape[0], -(-self.in_features // BLOCK) * BLOCK)
            )
        joined = Nvfp4Tensor(
            torch.cat([s.packed for s in shards]),
            torch.cat([s.sf.view(torch.uint8) for s in shards]).view(torch.float8_e4m3fn),
            torch.zeros(()),
        ).padded(N, K)
        self.put("weight", joined)
        if len(shards) == 1:
            self.weight_alpha.copy_(shards[0].alpha)
        else:
            rows = torch.cat([s.alpha.reshape(1).expand(s.shape[0]) for s in shards])
            self.weight_alpha.copy_(pad(rows, (0, N - len(rows))))
        if bias is not None:
            self.bias[: self.out_features].copy_(bias)
        return self

    @classmethod
    def from_float(
        cls, *modules: nn.Linear, compute: str = "nvfp4", method: str = "amax", device=None
    ) -> "Nvfp4Linear":
        """Quantize one nn.Linear, or several into one fused layer."""
        weights = [float_weight(m) for m in modules]
        biases = [m.bias for m in modules]
        if any(b is None for b in biases) != all(b is None for b in biases):
            raise ValueError("Nvfp4Linear.from_float: either all fused modules have a bias or none has")
        has_bias = biases[0] is not None
        layer = cls(
            weights[0].shape[1], [len(w) for w in weights], has_bias, compute, device or weights[0].device
        )
        bias = torch.cat([b.detach() for b in biases]) if has_bias else None
        return layer.load_weights(*(Nvfp4Tensor.quantize(w, method) for w in weights), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = pad(x, (0, self.weight_shapes["weight"][2] - self.in_features))
        y = ops.linear(x, self.weight, self.weight_sf, self.weight_alpha, self.compute, self.bias)
        return y[..., : self.out_features]

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={list(self.shards)}, compute={self.compute}{self.order}"


class Nvfp4GroupedLinear(Nvfp4Weights):
    """y[.., g, :] = x[.., g, :] W[g]^T: a block-diagonal linear (DeepSeek-V4's o_a_proj), one alpha a
    block."""

    def __init__(self, groups: int, in_features: int, out_features: int, compute: str = "nvfp4", device=None):
        super().__init__()
        self.groups, self.in_features, self.out_features = groups, in_features, out_features
        self.compute = compute
        self.hold("weight", (groups,), pad_n(out_features), pad_k(in_features), (), device)

    def load_weights(self, weight: Nvfp4Tensor) -> "Nvfp4GroupedLinear":
        """weight [groups, out, in], alpha [groups]."""
        rounded = -(-self.in_features // BLOCK) * BLOCK
        expect_shape("Nvfp4GroupedLinear", "weight", weight.shape, (self.groups, self.out_features, rounded))
        _, N, K = self.weight_shapes["weight"]
        self.put("weight", weight.padded(N, K))
        self.weight_alpha.copy_(weight.alpha)
        return self

    @classmethod
    def from_float(
        cls,
        weight: nn.Linear | Tensor,
        groups: int,
        compute: str = "nvfp4",
        method: str = "amax",
        device=None,
    ) -> "Nvfp4GroupedLinear":
        """weight [groups * out, in] (rows of one block together, as checkpoints store it) or [groups, out,
        in]."""
        w = float_weight(weight)
        w = w.unflatten(0, (groups, -1)) if w.dim() == 2 else w
        layer = cls(groups, w.shape[2], w.shape[1], compute, device or w.device)
        return layer.load_weights(Nvfp4Tensor.quantize(w, method))

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-2]
        x = pad(x, (0, self.weight_shapes["weight"][2] - self.in_features)).flatten(0, -3)  # [T, G, K]
        T = x.shape[0]
        rows = x.transpose(0, 1).flatten(0, 1)  # a block's rows together
        offsets = torch.arange(self.groups + 1, dtype=torch.int32, device=x.device) * T
        a = ops.quantize_rows(rows) if self.compute == "nvfp4" else (rows, None, None)
        y = ops.grouped_gemm(*a, self.weight, self.weight_sf, self.weight_alpha, offsets)
        y = y.unflatten(0, (self.groups, T)).transpose(0, 1)[..., : self.out_features]
        return y.reshape(*lead, self.groups, self.out_features)

    def extra_repr(self) -> str:
        size = f"groups={self.groups}, in={self.in_features}, out={self.out_features}"
        return f"{size}, compute={self.compute}{self.order}"

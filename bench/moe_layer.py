"""The subject of bench/moe.py: random NVFP4 experts of a model, tokens, what must move, and the reference."""

from dataclasses import dataclass

import torch
from cases import Model
from torch import Tensor

from nvfp4_moe import Nvfp4Tensor, ops

READ, TENSOR = 4.55e12, 790e12  # bytes/s, FLOP/s of the floor: what an H200 gave in cold.ceilings


@dataclass(frozen=True)
class Layer:
    model: Model
    w13: Nvfp4Tensor  # [E, 2I, H], gate rows then up rows, one alpha an expert
    w2: Nvfp4Tensor  # [E, H, I]


@dataclass(frozen=True)
class Tokens:
    x: Tensor  # bf16 [T, H]
    ids: Tensor  # int32 [T, k]
    weights: Tensor  # float32 [T, k]

    @property
    def all(self) -> tuple[Tensor, ...]:
        return self.x, self.ids, self.weights


def make_layer(model: Model) -> Layer:
    """Normal weights of deviation 0.02, made an expert at a time: in float32 all are 8 times as large."""
    random = torch.Generator("cuda").manual_seed(1)

    def quantized(rows: int, columns: int) -> Nvfp4Tensor:
        packed, sf, alpha = [], [], []
        for _ in range(model.experts):
            w = torch.randn(rows, columns, device="cuda", generator=random) * 0.02
            q = Nvfp4Tensor.quantize(w)
            packed.append(q.packed)
            sf.append(q.sf.view(torch.uint8))
            alpha.append(q.alpha)
        sf = torch.stack(sf).view(torch.float8_e4m3fn)
        return Nvfp4Tensor(torch.stack(packed), sf, torch.stack(alpha))

    return Layer(
        model,
        quantized(2 * model.intermediate, model.hidden),
        quantized(model.hidden, model.intermediate),
    )


def make_tokens(model: Model, T: int) -> Tokens:
    """Uniform routing to distinct experts. Seed and order of the draws are those of the study that the
    targets come from, so that on an H200 the same experts are hit."""
    random = torch.Generator("cuda").manual_seed(77 + T)
    x = torch.randn(T, model.hidden, device="cuda", generator=random)
    ids = torch.rand(T, model.experts, device="cuda", generator=random).topk(model.top_k).indices
    weights = torch.rand(T, model.top_k, device="cuda", generator=random)
    return Tokens(x.bfloat16(), ids.int(), weights / weights.sum(-1, keepdim=True))


@dataclass(frozen=True)
class Work:
    """What a call must do at least: read the experts it hits once, move each row's activations once (x, both
    of SwiGLU's sides, y), multiply."""

    hit: int  # experts with a row
    weight_bytes: int
    activation_bytes: int
    flop: int

    @property
    def memory_us(self) -> float:
        return (self.weight_bytes + self.activation_bytes) / READ * 1e6

    @property
    def tensor_us(self) -> float:
        return self.flop / TENSOR * 1e6

    @property
    def floor_us(self) -> float:
        return max(self.memory_us, self.tensor_us)


def work(model: Model, tokens: Tokens) -> Work:
    rows, H, I = tokens.ids.numel(), model.hidden, model.intermediate
    hit = len(tokens.ids.unique())
    weights = 3 * H * I
    return Work(hit, hit * weights * 9 // 16, rows * 2 * (2 * H + 2 * I), 2 * rows * weights)


def reference(layer: Layer, tokens: Tokens, compute: str) -> Tensor:
    """float32 [T, H] on the exactly dequantized weights; nvfp4 rounds where its definition does, since a
    code that flips would move more than any sum."""
    x = tokens.x.float()
    if compute == "nvfp4":
        x = _through_nvfp4(tokens.x)
    out = torch.zeros_like(x)
    for e in tokens.ids.unique().tolist():
        token, place = (tokens.ids == e).nonzero(as_tuple=True)
        w13, w2 = (ops.dequantize(w.packed[e], w.sf[e], w.alpha[e]) for w in (layer.w13, layer.w2))
        gate_up = x[token] @ w13.T
        if compute == "nvfp4":
            hidden = _through_nvfp4(ops.swiglu(gate_up.bfloat16()))
        else:
            gate, up = gate_up.chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * up
        out.index_add_(0, token, hidden @ w2.T * tokens.weights[token, place, None])
    return out


def _through_nvfp4(x: Tensor) -> Tensor:
    packed, sf, scale = ops.quantize_rows(x)
    return ops.dequantize(packed, sf, scale)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Over all outputs, in the 2-norm. Poisoned or NaN outputs give NaN, which no comparison passes."""
    return float((got.float() - want).norm() / want.norm())

"""route, permute, swiglu, swiglu_quantize, combine, moe."""

from torch import Tensor

from ..checks import ANY, FLOATS, check, expect, expect_multiple, expect_one_of, show_shape, size
from ..formats import BLOCK
from .base import ACTS, BF16, COMPUTES, F32, I32, SCORES, U8, fake, nvfp4, quantized
from .gemm import expect_weights
from .layouts import is_packed, packed_rows


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str = "softmax",
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """logits [T, E], bias float32 [E] -> weights float32 [T, k], ids int32 [T, k], best first."""
    return nvfp4.route(logits, bias, top_k, score, n_group, topk_group, renormalize, scale)


@fake
def _fake_route(logits, bias, top_k, score, n_group, topk_group, renormalize, scale):
    op = "route"
    expect(op, "logits", logits, logits, FLOATS, "[T, E]", (ANY, ANY))
    T, E = logits.shape
    if bias is not None:
        expect(op, "bias", bias, logits, (F32,), "[E]", (E,))
    check(1 <= top_k <= E, op, f"`top_k` must be in 1 .. E = {E}, got {top_k}")
    check(n_group >= 1 and E % n_group == 0, op, f"`n_group` must divide E = {E}, got {n_group}")
    ok = 1 <= topk_group <= n_group
    check(ok, op, f"`topk_group` must be in 1 .. n_group = {n_group}, got {topk_group}")
    expect_one_of(op, "score", score, SCORES)
    return logits.new_empty((T, top_k), dtype=F32), logits.new_empty((T, top_k), dtype=I32)


def permute(ids: Tensor, num_experts: int, first_expert: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids int32 [T, k] -> rows int32 [T k], offsets int32 [E+1], slots int32 [T, k] (-1: not one of our
    experts)."""
    return nvfp4.permute(ids, num_experts, first_expert)


@fake
def _fake_permute(ids, num_experts, first_expert):
    op = "permute"
    expect(op, "ids", ids, ids, (I32,), "[T, k]", (ANY, ANY))
    check(0 <= num_experts < 2**31 - 1, op, f"`num_experts` must not be negative, got {num_experts}")
    n = ids.shape[0] * ids.shape[1]
    check(n < 2**31 - 1, op, f"`ids` must have fewer than 2^31 entries, got {show_shape(ids.shape)}")
    return ids.new_empty(n), ids.new_empty(num_experts + 1), ids.new_empty(ids.shape)


def swiglu(gate_up: Tensor, act: str = "silu", act_alpha: float = 1.0, limit: float = 0.0) -> Tensor:
    """gate_up bf16 [.., 2I], gate then up ([.., I] for relu2) -> bf16 [.., I]."""
    return nvfp4.swiglu(gate_up, act, act_alpha, limit)


def _expect_gate_up(op, gate_up, act):
    expect_one_of(op, "act", act, ACTS)
    expect(op, "gate_up", gate_up, gate_up, (BF16,), "[.., 2I] ([.., I] for relu2)", (ANY,), tail=True)
    halves = 1 if act == "relu2" else 2
    expect_multiple(op, "the last dimension of `gate_up`", gate_up.shape[-1], halves)
    return gate_up.shape[:-1], gate_up.shape[-1] // halves


@fake
def _fake_swiglu(gate_up, act, act_alpha, limit):
    lead, I = _expect_gate_up("swiglu", gate_up, act)
    return gate_up.new_empty((*lead, I))


def swiglu_quantize(
    gate_up: Tensor, act: str = "silu", act_alpha: float = 1.0, limit: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_rows(swiglu(..)) in one pass."""
    return nvfp4.swiglu_quantize(gate_up, act, act_alpha, limit)


@fake
def _fake_swiglu_quantize(gate_up, act, act_alpha, limit):
    lead, I = _expect_gate_up("swiglu_quantize", gate_up, act)
    expect_multiple("swiglu_quantize", "I, the activation's width,", I, BLOCK)
    return *quantized(gate_up, lead, I), gate_up.new_empty(lead, dtype=F32)


def combine(y: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """y bf16 [R, H], slots int32 [T, k], weights float32 [T, k] -> bf16 [T, H], summed in float32 in order of
    k."""
    return nvfp4.combine(y, slots, weights)


@fake
def _fake_combine(y, slots, weights):
    expect("combine", "y", y, y, (BF16,), "[R, H]", (ANY, ANY))
    expect("combine", "slots", slots, y, (I32,), "[T, k]", (ANY, ANY))
    expect("combine", "weights", weights, y, (F32,), "[T, k]", slots.shape)
    return y.new_empty((slots.shape[0], y.shape[1]))


def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w13_sf: Tensor,
    w13_alpha: Tensor,
    w2: Tensor,
    w2_sf: Tensor,
    w2_alpha: Tensor,
    first_expert: int = 0,
    compute: str = "nvfp4",
    act: str = "silu",
    act_alpha: float = 1.0,
    limit: float = 0.0,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    """The layer after routing: x bf16 [T, H] -> bf16 [T, H].

    w13 [E, 2I, H/2] holds gate rows then up rows ([E, I, H/2] for relu2), w2 [E, H, I/2]; *_sf interleaved;
    alphas [E] or [E, 2]; biases float32 [E, N]. ids outside [first_expert, first_expert + E) are skipped."""
    return nvfp4.moe(
        x, ids, weights, w13, w13_sf, w13_alpha, w2, w2_sf, w2_alpha,
        first_expert, compute, act, act_alpha, limit, w13_bias, w2_bias,
    )  # fmt: skip


def _width_of(x, w13, w13_sf, w2, w2_sf, halves):
    """I, the layer's width inside, of its weights; their shapes are checked later."""
    op, H, packed = "moe", x.shape[1], is_packed(w13, w13_sf, 2)
    only = "`w13`" if packed else "`w2`"
    both = "`w13` and `w2` must both be packed for sm90 or neither"
    check(packed == is_packed(w2, w2_sf, 2), op, f"{both}, got only {only}")
    if packed:
        return packed_rows(op, "w13", w13, H) // halves
    expect(op, "w2", w2, x, (U8,), "[E, H, I/2]", (ANY, H, ANY))
    expect_multiple(op, "H, the last dimension of `x`,", H, BLOCK)
    expect_multiple(op, "I, twice the last dimension of `w2`,", 2 * w2.shape[2], BLOCK)
    return 2 * w2.shape[2]


@fake
def _fake_moe(
    x, ids, weights, w13, w13_sf, w13_alpha, w2, w2_sf, w2_alpha,
    first_expert, compute, act, act_alpha, limit, w13_bias=None, w2_bias=None,
):  # fmt: skip
    op = "moe"
    expect_one_of(op, "compute", compute, COMPUTES)
    expect_one_of(op, "act", act, ACTS)
    expect(op, "x", x, x, (BF16,), "[T, H]", (ANY, ANY))
    T, H = x.shape
    expect(op, "ids", ids, x, (I32,), "[T, k]", (T, ANY))
    expect(op, "weights", weights, x, (F32,), "[T, k]", ids.shape)
    halves = 1 if act == "relu2" else 2
    E, I = size(w2, 0), _width_of(x, w13, w13_sf, w2, w2_sf, halves)
    expect_weights(op, "w13", x, w13, w13_sf, w13_alpha, w13_bias, E, halves * I, H)
    expect_weights(op, "w2", x, w2, w2_sf, w2_alpha, w2_bias, E, H, I)
    return x.new_empty((T, H))

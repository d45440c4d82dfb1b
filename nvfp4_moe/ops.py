"""torch.ops.nvfp4.*: a typed wrapper and, beside it, the fake that torch.compile and meta tensors use.

What each operator computes: nvfp4_moe/reference. Shapes: T tokens, k experts a token, R rows, E experts, S =
K/16. The operators are for inference: an input that requires grad under grad mode is an error."""

import torch
from torch import Tensor

from .checks import (
    ANY,
    FLOATS,
    check,
    expect,
    expect_contiguous,
    expect_multiple,
    expect_one_of,
    expect_scale,
    show_shape,
    size,
)
from .formats import BLOCK, MX_BLOCK, sf_cosize

U8, F8, F32, BF16, I32 = (torch.uint8, torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.int32)
COMPUTES = ("nvfp4", "bf16")
ACTS = ("silu", "swiglu_limit", "swiglu_oai", "relu2")
SCORES = ("softmax", "sigmoid", "sqrt_softplus")
MXFP4_METHODS = ("best", "requantize", "verbatim_midpoint", "verbatim_search", "hybrid")

_ops = torch.ops.nvfp4


def _fake(function):
    """Register `function`, named after its operator, as the fake, and refuse autograd for that operator."""
    name = "nvfp4::" + function.__name__.removeprefix("_fake_")

    def refuse(*args, **kwargs):
        raise RuntimeError(
            f"{name} is for inference only: call it under torch.no_grad() or torch.inference_mode()"
        )

    torch.library.register_fake(name, function)
    torch.library.register_autograd(name, refuse, setup_context=refuse)
    return function


def _quantized(x: Tensor, lead, K: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((*lead, K // 2), dtype=U8), x.new_empty((*lead, K // BLOCK), dtype=F8)


# ---- quantize ---------------------------------------------------------------------------------------


def tensor_scale(x: Tensor) -> Tensor:
    """x -> float32 []: max |x| over finite values / 2688, on x's device."""
    return _ops.tensor_scale(x)


@_fake
def _fake_tensor_scale(x):
    expect("tensor_scale", "x", x, x, FLOATS, "[..]", (), tail=True)
    return x.new_empty((), dtype=F32)


def quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., K], scale float32 [] or broadcastable to x.shape[:-1] -> packed [.., K/2], sf [.., S]."""
    return _ops.quantize(x, scale)


def _expect_values(op, x):
    expect(op, "x", x, x, FLOATS, "[.., K]", (ANY,), tail=True)
    expect_multiple(op, "K, the last dimension of `x`,", x.shape[-1], BLOCK)


@_fake
def _fake_quantize(x, scale):
    _expect_values("quantize", x)
    expect_scale("quantize", "scale", scale, x, x.shape[:-1])
    return _quantized(x, x.shape[:-1], x.shape[-1])


def quantize_rows(x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x [.., K] -> packed, sf, scale [..]: one power-of-two scale a row; `rows` int32 [R] gathers x[rows]
    first."""
    return _ops.quantize_rows(x, rows)


@_fake
def _fake_quantize_rows(x, rows=None):
    op = "quantize_rows"
    _expect_values(op, x)
    lead = x.shape[:-1]
    if rows is not None:
        expect(op, "x", x, x, FLOATS, "[T, K] where `rows` is given", (ANY, x.shape[-1]))
        expect(op, "rows", rows, x, (I32,), "[R]", (ANY,))
        n = rows.shape[0]
        check(
            lead[0] > 0 or n == 0,
            op,
            f"`x` must have a row to gather, got {show_shape(x.shape)} with {n} `rows`",
        )
        lead = rows.shape
    return *_quantized(x, lead, x.shape[-1]), x.new_empty(lead, dtype=F32)


def dequantize(packed: Tensor, sf: Tensor, scale: Tensor, dtype: torch.dtype = F32) -> Tensor:
    """packed [.., K/2], sf [.., S], scale [] or broadcastable to the leading shape -> [.., K]."""
    return _ops.dequantize(packed, sf, scale, dtype)


@_fake
def _fake_dequantize(packed, sf, scale, dtype):
    op = "dequantize"
    expect(op, "packed", packed, packed, (U8,), "[.., K/2]", (ANY,), tail=True)
    lead, K = packed.shape[:-1], 2 * packed.shape[-1]
    expect_multiple(op, "K, twice the last dimension of `packed`,", K, BLOCK)
    expect(op, "sf", sf, packed, (F8,), "[.., K/16]", (*lead, K // BLOCK))
    got = str(dtype).removeprefix("torch.")
    check(dtype in FLOATS, op, f"`dtype` must be float32 | float16 | bfloat16, got {got}")
    expect_scale(op, "scale", scale, packed, lead)
    return packed.new_empty((*lead, K), dtype=dtype)


def mxfp4_to_nvfp4(packed: Tensor, e8m0: Tensor, method: str = "best") -> tuple[Tensor, Tensor, Tensor]:
    """packed [.., N, K/2], e8m0 [.., N, K/32] uint8 or float8_e8m0fnu -> packed, sf [.., N, S], alpha
    [..]."""
    return _ops.mxfp4_to_nvfp4(packed, e8m0, method)


@_fake
def _fake_mxfp4_to_nvfp4(packed, e8m0, method):
    op = "mxfp4_to_nvfp4"
    expect(op, "packed", packed, packed, (U8,), "[.., N, K/2]", (ANY, ANY), tail=True)
    (*lead, N, half) = packed.shape
    expect_multiple(op, "K, twice the last dimension of `packed`,", 2 * half, MX_BLOCK)
    wanted = (*lead, N, 2 * half // MX_BLOCK)
    expect(op, "e8m0", e8m0, packed, (U8, torch.float8_e8m0fnu), "[.., N, K/32]", wanted)
    expect_one_of(op, "method", method, MXFP4_METHODS)
    return *_quantized(packed, (*lead, N), 2 * half), packed.new_empty(lead, dtype=F32)


# ---- remap_sf ---------------------------------------------------------------------------------------


def remap_sf(sf: Tensor) -> Tensor:
    """Linear scale factors [.., M, S] -> interleaved [.., cosize]; padding is zero."""
    return _ops.remap_sf(sf)


@_fake
def _fake_remap_sf(sf):
    expect("remap_sf", "sf", sf, sf, (F8,), "[.., M, S]", (ANY, ANY), tail=True)
    return sf.new_empty((*sf.shape[:-2], sf_cosize(sf.shape[-2], sf.shape[-1])))


def unmap_sf(sf: Tensor, rows: int, cols: int) -> Tensor:
    """Interleaved scale factors [.., cosize(rows, cols)] -> linear [.., rows, cols]."""
    return _ops.unmap_sf(sf, rows, cols)


@_fake
def _fake_unmap_sf(sf, rows, cols):
    op = "unmap_sf"
    check(rows >= 0 and cols >= 0, op, f"`rows` and `cols` must not be negative, got {rows} and {cols}")
    expect(op, "sf", sf, sf, (F8,), "[.., cosize(rows, cols)]", (sf_cosize(rows, cols),), tail=True)
    return sf.new_empty((*sf.shape[:-1], rows, cols))


# ---- gemm -------------------------------------------------------------------------------------------


def grouped_gemm(
    a: Tensor,
    a_sf: Tensor | None,
    a_scale: Tensor | None,
    b: Tensor,
    b_sf: Tensor,
    alpha: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Rows offsets[e] .. offsets[e+1] of a times expert e's weights -> bf16 [R, N].

    a: packed [R, K/2] with a_sf [R, S] and a_scale [] or [R], or bf16 [R, K] with neither. b [E, N, K/2],
    b_sf interleaved [E, cosize(N, S)], alpha float32 [E] or [E, 2] (gate half, up half), bias float32 [E, N].
    """
    return _ops.grouped_gemm(a, a_sf, a_scale, b, b_sf, alpha, offsets, bias)


def _expect_weights(op, w, home, b, b_sf, alpha, bias, E, N, K):
    sf, al, bs = (f"{w}_sf", "alpha", "bias") if w == "b" else (f"{w}_sf", f"{w}_alpha", f"{w}_bias")
    expect(op, w, b, home, (U8,), "[E, N, K/2]", (E, N, K // 2))
    expect_contiguous(op, w, b)
    expect(op, sf, b_sf, home, (F8,), "[E, cosize(N, K/16)]", (E, sf_cosize(N, K // BLOCK)))
    expect_contiguous(op, sf, b_sf)
    expect(op, al, alpha, home, (F32,), "[E] or [E, 2]", (E, 2) if alpha.dim() == 2 else (E,))
    if alpha.dim() == 2:
        expect_multiple(op, f"N of `{w}`, split between two alphas,", N, 2)
    expect_contiguous(op, al, alpha)
    if bias is not None:
        expect(op, bs, bias, home, (F32,), "[E, N]", (E, N))
        expect_contiguous(op, bs, bias)


@_fake
def _fake_grouped_gemm(a, a_sf, a_scale, b, b_sf, alpha, offsets, bias=None):
    op = "grouped_gemm"
    expect(op, "b", b, a, (U8,), "[E, N, K/2]", (ANY, ANY, ANY))
    (E, N, half), R = b.shape, size(a, 0)
    expect_multiple(op, "K, twice the last dimension of `b`,", 2 * half, BLOCK)
    check(
        (a_sf is None) == (a_scale is None),
        op,
        "`a_sf` and `a_scale` must be given together (packed `a`) or not at all (bfloat16 `a`), got only "
        + ("`a_scale`" if a_sf is None else "`a_sf`"),
    )
    if a_sf is not None:
        expect(op, "a", a, a, (U8,), "[R, K/2], packed as `a_sf` is given,", (ANY, half))
        expect(op, "a_sf", a_sf, a, (F8,), "[R, K/16]", (R, 2 * half // BLOCK))
    else:
        expect(op, "a", a, a, (BF16,), "[R, K], as no `a_sf` is given,", (ANY, 2 * half))
    _expect_weights(op, "b", a, b, b_sf, alpha, bias, E, N, 2 * half)
    expect(op, "offsets", offsets, a, (I32,), "[E+1]", (E + 1,))
    if a_scale is not None:
        expect_scale(op, "a_scale", a_scale, a, (R,))
    return a.new_empty((R, N), dtype=BF16)


def linear(
    x: Tensor, b: Tensor, b_sf: Tensor, alpha: Tensor, compute: str = "nvfp4", bias: Tensor | None = None
) -> Tensor:
    """x bf16 [.., K], b [N, K/2], b_sf [cosize(N, S)], alpha float32 [] or [N], bias float32 [N] -> bf16 [..,
    N]."""
    return _ops.linear(x, b, b_sf, alpha, compute, bias)


@_fake
def _fake_linear(x, b, b_sf, alpha, compute, bias=None):
    op = "linear"
    expect_one_of(op, "compute", compute, COMPUTES)
    expect(op, "b", b, x, (U8,), "[N, K/2]", (ANY, ANY))
    expect_contiguous(op, "b", b)
    N, K = b.shape[0], 2 * b.shape[1]
    expect_multiple(op, "K, twice the last dimension of `b`,", K, BLOCK)
    expect(op, "x", x, b, (BF16,), "[.., K]", (K,), tail=True)
    expect(op, "b_sf", b_sf, x, (F8,), "[cosize(N, K/16)]", (sf_cosize(N, K // BLOCK),))
    expect_contiguous(op, "b_sf", b_sf)
    expect(op, "alpha", alpha, x, (F32,), "[] or [N]", () if alpha.dim() == 0 else (N,))
    if bias is not None:
        expect(op, "bias", bias, x, (F32,), "[N]", (N,))
    return x.new_empty((*x.shape[:-1], N))


def gemm_plan(R: int, N: int, K: int, E: int, compute: str = "nvfp4") -> str:
    """What would run for these sizes on this machine, in words."""
    return _ops.gemm_plan(R, N, K, E, compute)


# ---- moe --------------------------------------------------------------------------------------------


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
    return _ops.route(logits, bias, top_k, score, n_group, topk_group, renormalize, scale)


@_fake
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
    return _ops.permute(ids, num_experts, first_expert)


@_fake
def _fake_permute(ids, num_experts, first_expert):
    op = "permute"
    expect(op, "ids", ids, ids, (I32,), "[T, k]", (ANY, ANY))
    check(0 <= num_experts < 2**31 - 1, op, f"`num_experts` must not be negative, got {num_experts}")
    n = ids.shape[0] * ids.shape[1]
    check(n < 2**31 - 1, op, f"`ids` must have fewer than 2^31 entries, got {show_shape(ids.shape)}")
    return ids.new_empty(n), ids.new_empty(num_experts + 1), ids.new_empty(ids.shape)


def swiglu(gate_up: Tensor, act: str = "silu", act_alpha: float = 1.0, limit: float = 0.0) -> Tensor:
    """gate_up bf16 [.., 2I], gate then up ([.., I] for relu2) -> bf16 [.., I]."""
    return _ops.swiglu(gate_up, act, act_alpha, limit)


def _expect_gate_up(op, gate_up, act):
    expect_one_of(op, "act", act, ACTS)
    expect(op, "gate_up", gate_up, gate_up, (BF16,), "[.., 2I] ([.., I] for relu2)", (ANY,), tail=True)
    halves = 1 if act == "relu2" else 2
    expect_multiple(op, "the last dimension of `gate_up`", gate_up.shape[-1], halves)
    return gate_up.shape[:-1], gate_up.shape[-1] // halves


@_fake
def _fake_swiglu(gate_up, act, act_alpha, limit):
    lead, I = _expect_gate_up("swiglu", gate_up, act)
    return gate_up.new_empty((*lead, I))


def swiglu_quantize(
    gate_up: Tensor, act: str = "silu", act_alpha: float = 1.0, limit: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_rows(swiglu(..)) in one pass."""
    return _ops.swiglu_quantize(gate_up, act, act_alpha, limit)


@_fake
def _fake_swiglu_quantize(gate_up, act, act_alpha, limit):
    lead, I = _expect_gate_up("swiglu_quantize", gate_up, act)
    expect_multiple("swiglu_quantize", "I, the activation's width,", I, BLOCK)
    return *_quantized(gate_up, lead, I), gate_up.new_empty(lead, dtype=F32)


def combine(y: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """y bf16 [R, H], slots int32 [T, k], weights float32 [T, k] -> bf16 [T, H], summed in float32 in order of
    k."""
    return _ops.combine(y, slots, weights)


@_fake
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
    return _ops.moe(
        x, ids, weights, w13, w13_sf, w13_alpha, w2, w2_sf, w2_alpha,
        first_expert, compute, act, act_alpha, limit, w13_bias, w2_bias,
    )  # fmt: skip


@_fake
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
    expect(op, "w2", w2, x, (U8,), "[E, H, I/2]", (ANY, H, ANY))
    E, I = w2.shape[0], 2 * w2.shape[2]
    expect_multiple(op, "H, the last dimension of `x`,", H, BLOCK)
    expect_multiple(op, "I, twice the last dimension of `w2`,", I, BLOCK)
    _expect_weights(op, "w13", x, w13, w13_sf, w13_alpha, w13_bias, E, I if act == "relu2" else 2 * I, H)
    _expect_weights(op, "w2", x, w2, w2_sf, w2_alpha, w2_bias, E, H, I)
    return x.new_empty((T, H))

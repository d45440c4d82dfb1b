"""grouped_gemm, linear, gemm_plan."""

from torch import Tensor

from ..checks import ANY, check, expect, expect_contiguous, expect_multiple, expect_one_of, expect_scale
from ..formats import BLOCK, sf_cosize
from .base import BF16, COMPUTES, F8, F32, I32, U8, fake, nvfp4
from .layouts import expect_packed, is_packed, packed_rows


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
    On Hopper b may be pack_sm90's [E, bytes] instead, b_sf then being empty; linear and moe take it too."""
    return nvfp4.grouped_gemm(a, a_sf, a_scale, b, b_sf, alpha, offsets, bias)


def expect_weights(op, w, home, b, b_sf, alpha, bias, E, N, K):
    sf, al, bs = (f"{w}_sf", "alpha", "bias") if w == "b" else (f"{w}_sf", f"{w}_alpha", f"{w}_bias")
    if is_packed(b, b_sf, 2):
        expect_packed(op, w, home, b, b_sf, (E,), N, K)
    else:
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


@fake
def _fake_grouped_gemm(a, a_sf, a_scale, b, b_sf, alpha, offsets, bias=None):
    op = "grouped_gemm"
    packed = is_packed(b, b_sf, 2)
    if not packed:
        expect(op, "b", b, a, (U8,), "[E, N, K/2]", (ANY, ANY, ANY))
        expect_multiple(op, "K, twice the last dimension of `b`,", 2 * b.shape[2], BLOCK)
    check(
        (a_sf is None) == (a_scale is None),
        op,
        "`a_sf` and `a_scale` must be given together (packed `a`) or not at all (bfloat16 `a`), got only "
        + ("`a_scale`" if a_sf is None else "`a_sf`"),
    )
    if a_sf is not None:
        half = ANY if packed else b.shape[2]
        expect(op, "a", a, a, (U8,), "[R, K/2], packed as `a_sf` is given,", (ANY, half))
    else:
        K = ANY if packed else 2 * b.shape[2]
        expect(op, "a", a, a, (BF16,), "[R, K], as no `a_sf` is given,", (ANY, K))
    E, R, K = b.shape[0], a.shape[0], a.shape[1] * (1 if a_sf is None else 2)
    if a_sf is not None:
        expect(op, "a_sf", a_sf, a, (F8,), "[R, K/16]", (R, K // BLOCK))
    N = packed_rows(op, "b", b, K) if packed else b.shape[1]
    expect_weights(op, "b", a, b, b_sf, alpha, bias, E, N, K)
    expect(op, "offsets", offsets, a, (I32,), "[E+1]", (E + 1,))
    if a_scale is not None:
        expect_scale(op, "a_scale", a_scale, a, (R,))
    return a.new_empty((R, N), dtype=BF16)


def linear(
    x: Tensor, b: Tensor, b_sf: Tensor, alpha: Tensor, compute: str = "nvfp4", bias: Tensor | None = None
) -> Tensor:
    """x bf16 [.., K], b [N, K/2], b_sf [cosize(N, S)], alpha float32 [] or [N], bias float32 [N] -> bf16 [..,
    N]."""
    return nvfp4.linear(x, b, b_sf, alpha, compute, bias)


@fake
def _fake_linear(x, b, b_sf, alpha, compute, bias=None):
    op = "linear"
    expect_one_of(op, "compute", compute, COMPUTES)
    packed = is_packed(b, b_sf, 1)
    if not packed:
        expect(op, "b", b, x, (U8,), "[N, K/2]", (ANY, ANY))
        expect_contiguous(op, "b", b)
        expect_multiple(op, "K, twice the last dimension of `b`,", 2 * b.shape[1], BLOCK)
    expect(op, "x", x, b, (BF16,), "[.., K]", (ANY if packed else 2 * b.shape[1],), tail=True)
    K = x.shape[-1]
    N = packed_rows(op, "b", b, K) if packed else b.shape[0]
    if packed:
        expect_packed(op, "b", x, b, b_sf, (), N, K)
    else:
        expect(op, "b_sf", b_sf, x, (F8,), "[cosize(N, K/16)]", (sf_cosize(N, K // BLOCK),))
        expect_contiguous(op, "b_sf", b_sf)
    expect(op, "alpha", alpha, x, (F32,), "[] or [N]", () if alpha.dim() == 0 else (N,))
    if bias is not None:
        expect(op, "bias", bias, x, (F32,), "[N]", (N,))
    return x.new_empty((*x.shape[:-1], N))


def gemm_plan(R: int, N: int, K: int, E: int, compute: str = "nvfp4") -> str:
    """What would run for these sizes on this machine, in words."""
    return nvfp4.gemm_plan(R, N, K, E, compute)

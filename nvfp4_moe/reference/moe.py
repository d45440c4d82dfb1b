"""Routing, activations, combine and the whole layer: the definitions."""

import torch
from torch import Tensor

from . import numbers
from .gemm import grouped_gemm
from .numbers import f32, fma, lane_sum
from .quantize import quantize_rows


def _scores(logits: Tensor, score: str) -> Tensor:
    """Unbiased scores float32 [T, E]. A NaN logit has a NaN score and takes no part in the softmax of the
    others."""
    x = logits.float()
    if score == "sigmoid":
        return numbers.sigmoid(x)
    if score == "sqrt_softplus":
        return numbers.sqrt(numbers.softplus(x))
    finite_or_inf = torch.where(x.isnan(), -torch.inf, x)
    top = finite_or_inf.amax(-1, keepdim=True)
    distance = torch.where(finite_or_inf == top, 0.0, finite_or_inf - top)  # inf - inf counts as 0
    terms = torch.where(x.isnan(), 0.0, numbers.exp(distance))
    return torch.where(x.isnan(), torch.nan, terms * (1 / lane_sum(terms))[..., None])


def _mask_losing_groups(choice: Tensor, n_group: int, topk_group: int) -> Tensor:
    """A group's score is the sum of its two best; only the topk_group best groups stay, ties to the lower
    index."""
    groups = choice.unflatten(-1, (n_group, -1))  # [T, G, E/G]
    best = groups.sort(dim=-1, descending=True, stable=True).values[..., :2]
    group_score = best[..., 0] + best[..., 1] if best.shape[-1] == 2 else best[..., 0]
    winners = group_score.sort(dim=-1, descending=True, stable=True).indices[..., :topk_group]
    keep = torch.zeros_like(group_score, dtype=torch.bool).scatter(-1, winners, True)
    return torch.where(keep[..., None], groups, -torch.inf).flatten(-2)


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """logits [T, E], bias float32 [E] -> weights float32 [T, k], ids int32 [T, k], by descending selection
    score.

    A selection score of NaN or -inf is never chosen; where choices run out, id -1 and weight 0.
    """
    scores = _scores(logits, score)
    choice = scores if bias is None else scores + bias
    choice = torch.where(choice.isnan(), -torch.inf, choice)
    if n_group > 1:
        choice = _mask_losing_groups(choice, n_group, topk_group)
    order = choice.sort(dim=-1, descending=True, stable=True)
    ids = order.indices[..., :top_k]
    chosen = order.values[..., :top_k] > -torch.inf
    weights = torch.where(chosen, scores.gather(-1, ids), 0.0)
    if renormalize:
        total = torch.zeros(len(logits), dtype=f32)
        for j in range(top_k):
            total = total + weights[:, j]
        weights = weights / (total + 1e-20)[:, None]
    return weights * torch.tensor(scale, dtype=f32), torch.where(chosen, ids, -1).int()


def permute(ids: Tensor, num_experts: int, first_expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids int32 [T, k] -> rows int32 [T k], offsets int32 [E+1], slots int32 [T, k]; sorted by (expert, t,
    j)."""
    T, k = ids.shape
    local = ids.flatten().long() - first_expert
    mine = (local >= 0) & (local < num_experts)
    order = torch.where(mine, local, num_experts).sort(stable=True).indices
    count = int(mine.sum())
    rows = torch.zeros(T * k, dtype=torch.int32)
    rows[:count] = (order[:count] // max(k, 1)).int()
    slots = torch.full((T * k,), -1, dtype=torch.int32)
    slots[order[:count]] = torch.arange(count, dtype=torch.int32)
    counts = torch.bincount(local[mine], minlength=num_experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).int()
    return rows, offsets, slots.view(T, k)


def swiglu(gate_up: Tensor, act: str, act_alpha: float, limit: float) -> Tensor:
    """gate_up bf16 [.., 2I] (gate then up; relu2: [.., I]) -> bf16 [.., I]; float32 inside."""
    x = gate_up.float()
    if act == "relu2":
        r = torch.where(x < 0, 0.0, x)
        return (r * r).bfloat16()
    g, u = x.chunk(2, -1)
    if act != "silu":
        limit = torch.tensor(limit, dtype=f32)
        g = torch.where(g > limit, limit, g)
        u = torch.where(u > limit, limit, torch.where(u < -limit, -limit, u))
    if act == "swiglu_oai":
        s = numbers.swish(g, act_alpha)
        return fma(s, u, s).bfloat16()  # times u + 1
    return (numbers.swish(g, 1.0) * u).bfloat16()


def swiglu_quantize(
    gate_up: Tensor, act: str, act_alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(swiglu(gate_up, act, act_alpha, limit))


def combine(y: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """y bf16 [R, H], slots int32 [T, k], weights float32 [T, k] -> bf16 [T, H]: a fixed-order float32 sum."""
    T, k = slots.shape
    acc = torch.zeros(T, y.shape[1], dtype=f32)
    for j in range(k):
        slot = slots[:, j].long()
        valid = (slot >= 0) & (slot < len(y))
        rows = y.float()[slot.clamp(0, max(len(y) - 1, 0))] if len(y) else torch.zeros_like(acc)
        acc = torch.where(valid[:, None], fma(rows, weights[:, j, None].expand_as(rows), acc), acc)
    return acc.bfloat16()


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
    first_expert: int,
    compute: str,
    act: str,
    act_alpha: float,
    limit: float,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    """x bf16 [T, H], ids int32 [T, k], weights float32 [T, k]; w13 [E, 2I, H/2], w2 [E, H, I/2] -> bf16 [T,
    H]."""
    rows, offsets, slots = permute(ids, len(w13), first_expert)
    if compute == "nvfp4":
        gate_up = grouped_gemm(*quantize_rows(x, rows), w13, w13_sf, w13_alpha, offsets, w13_bias)
        hidden = swiglu_quantize(gate_up, act, act_alpha, limit)
        y = grouped_gemm(*hidden, w2, w2_sf, w2_alpha, offsets, w2_bias)
    else:
        gate_up = grouped_gemm(x[rows.long()], None, None, w13, w13_sf, w13_alpha, offsets, w13_bias)
        hidden = swiglu(gate_up, act, act_alpha, limit)
        y = grouped_gemm(hidden, None, None, w2, w2_sf, w2_alpha, offsets, w2_bias)
    return combine(y, slots, weights)

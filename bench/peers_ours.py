"""torch.ops.nvfp4.moe and what torch offers beside it: the same steps around torch._grouped_mm in BF16."""

from collections.abc import Callable

import torch
from moe_layer import Layer, Tokens
from torch import Tensor

from nvfp4_moe import Nvfp4Tensor, ops


def runs_packed() -> bool:
    """Whether weights in Hopper's own order run here."""
    return ops.gemm_plan(1, 128, 128, 1, "bf16").startswith("sm90")


def weights(w: Nvfp4Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    sf = w.interleaved_sf()
    return (ops.pack_sm90(w.packed, sf), sf.new_empty(0), w.alpha) if packed else (w.packed, sf, w.alpha)


def ours(layer: Layer, compute: str, packed: bool = False) -> Callable[[Tokens], Tensor]:
    experts = *weights(layer.w13, packed), *weights(layer.w2, packed)
    return lambda t: ops.moe(*t.all, *experts, compute=compute)


def orders(layer: Layer, computes: list[str]) -> dict[str, Callable[[Tokens], Tensor]]:
    """Ours as a layer runs after pack_(), and beside it, in one compute, the public layout."""
    packed = runs_packed()
    runs = {f"ours {compute}": ours(layer, compute, packed) for compute in computes}
    return runs | ({f"ours {computes[0]} public": ours(layer, computes[0])} if packed else {})


def bf16(layer: Layer) -> dict[str, Callable[[Tokens], Tensor]]:
    w13, w2 = (w.dequantize(torch.bfloat16).transpose(1, 2) for w in (layer.w13, layer.w2))

    def run(t: Tokens) -> Tensor:
        rows, offsets, slots = ops.permute(t.ids, layer.model.experts)
        ends = offsets[1:]
        gate_up = torch._grouped_mm(t.x.index_select(0, rows), w13, offs=ends)
        y = torch._grouped_mm(ops.swiglu(gate_up), w2, offs=ends)
        return ops.combine(y, slots, t.weights)

    return {"BF16": run}

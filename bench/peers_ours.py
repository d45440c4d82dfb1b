"""torch.ops.nvfp4.moe and what torch offers beside it: the same steps around torch._grouped_mm in BF16."""

from collections.abc import Callable

import torch
from moe_layer import Layer, Tokens
from torch import Tensor

from nvfp4_moe import ops


def ours(layer: Layer, compute: str) -> Callable[[Tokens], Tensor]:
    w13, w2 = layer.w13, layer.w2
    w13_sf, w2_sf = w13.interleaved_sf(), w2.interleaved_sf()

    def run(t: Tokens) -> Tensor:
        return ops.moe(
            t.x, t.ids, t.weights, w13.packed, w13_sf, w13.alpha, w2.packed, w2_sf, w2.alpha, compute=compute
        )

    return run


def bf16(layer: Layer) -> dict[str, Callable[[Tokens], Tensor]]:
    w13, w2 = (w.dequantize(torch.bfloat16).transpose(1, 2) for w in (layer.w13, layer.w2))

    def run(t: Tokens) -> Tensor:
        rows, offsets, slots = ops.permute(t.ids, layer.model.experts)
        ends = offsets[1:]
        gate_up = torch._grouped_mm(t.x.index_select(0, rows), w13, offs=ends)
        y = torch._grouped_mm(ops.swiglu(gate_up), w2, offs=ends)
        return ops.combine(y, slots, t.weights)

    return {"BF16": run}

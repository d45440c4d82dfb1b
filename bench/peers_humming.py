"""humming-kernels (0.1.19), which vLLM can run NVFP4 experts with, driven as its fused_humming_moe does.

Two forms. grouped: rows sorted by expert. indexed (vLLM's default without expert parallelism): rows stay, and
a GEMM's tiles gather them. Gathering, GEMMs and SwiGLU are humming's, its own choice of tiles; sorting and
the weighted sum are ours, alignment is vLLM's (peers_vllm). Kernels are compiled at first use."""

import json
from collections.abc import Callable

import peers_vllm
import torch
from moe_layer import Layer, Tokens
from torch import Tensor

from nvfp4_moe import Nvfp4Tensor, ops

SWIGLU = {"activation_type": "binary_split", "activation_impl": "(a / (1.f + expf(-a))) * b"}


def humming_layer(w: Nvfp4Tensor):
    from humming.layer import HummingLayer

    E, N, K = w.shape
    with torch.device("cuda"):
        layer = HummingLayer(
            shape_n=N, shape_k=K, num_experts=E, torch_dtype=torch.bfloat16,
            weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
            pad_n_to_multiple=256, pad_k_to_multiple=128,
        )  # fmt: skip
    layer.load_from_tensors({"weight": w.packed, "weight_scale": w.sf, "weight_scale_2": w.alpha})
    layer.transform()
    return layer


class Gemms:
    """Both of a layer's GEMMs in one form, and the activation between them."""

    def __init__(self, layers, form: str):
        from humming.tune import get_heuristics_config

        self.layers, self.form = layers, json.dumps({"gemm_type": form})
        self.tiles = [get_heuristics_config(layer_config=m.humming_config, gemm_type=form) for m in layers]
        self.tuning = [json.dumps(tiles) for tiles in self.tiles]

    def block(self, which: int, rows: int) -> int:
        """Rows of a tile at so many rows, which is what alignment must pad to."""
        fitting = (tile["block_shape"][0] for low, high, tile in self.tiles[which] if low < rows <= high)
        return next(fitting, 64)

    def gemm(self, which: int, a: Tensor, rows: int, **places) -> Tensor:
        return self.layers[which](
            a, valid_shape_m=rows, compute_config=self.form, tuning_config=self.tuning[which], **places
        )

    def process(self, which: int, x: Tensor, **options) -> Tensor:
        from humming.forward import may_process_input

        return may_process_input(self.layers[which].humming_config, inputs=x, **options)[0]


def grouped(layer: Layer, gemms: Gemms) -> Callable[[Tokens], Tensor]:
    def run(t: Tokens) -> Tensor:
        rows = t.ids.numel()
        _, offsets, slots = ops.permute(t.ids, layer.model.experts)
        gathered = t.x.new_empty(rows, layer.model.hidden)
        gemms.process(0, t.x, outputs=gathered, layout="scatter", scatter_idx=slots)
        gate_up = gemms.gemm(0, gathered, rows, expert_layout=offsets)
        y = gemms.gemm(1, gemms.process(1, gate_up, **SWIGLU), rows, expert_layout=offsets)
        return ops.combine(y, slots, t.weights)

    return run


def indexed(layer: Layer, gemms: Gemms) -> Callable[[Tokens], Tensor]:
    peers_vllm.operators()
    names = "sorted_ids", "expert_ids", "num_tokens_padded"

    def places(t: Tokens, block: int) -> dict[str, Tensor]:
        return dict(zip(names, peers_vllm.align(t.ids, layer.model.experts, block), strict=True))

    def run(t: Tokens) -> Tensor:
        T, k = t.ids.shape
        first, second = gemms.block(0, T * k), gemms.block(1, T * k)
        at = places(t, first)
        gate_up = gemms.gemm(0, t.x, T * k, top_k=k, **at)
        at = at if second == first else places(t, second)
        hidden = gemms.process(1, gate_up, **SWIGLU)
        y = gemms.gemm(1, hidden, T * k, top_k=1, **at)
        return ops.combine(y, in_order[: T * k].view(T, k), t.weights)

    in_order = torch.arange(1 << 18, dtype=torch.int32, device="cuda")
    return run


def make(layer: Layer) -> dict[str, Callable[[Tokens], Tensor] | str]:
    layers = [humming_layer(w) for w in (layer.w13, layer.w2)]
    runs = {"humming grouped": grouped(layer, Gemms(layers, "grouped_contiguous"))}
    try:
        runs["humming indexed"] = indexed(layer, Gemms(layers, "indexed"))
    except ImportError as missing:
        runs["humming indexed"] = f"alignment: {missing}"
    return runs

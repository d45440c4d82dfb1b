"""MoE blocks: which modules belong to one, and all its experts stacked as layers want them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..tensor import Mxfp4Tensor, Nvfp4Tensor
from .dialects import Module
from .header import CheckpointError
from .names import EXPERT, PART, STACKED

ROUTERS = ("gate", "router")  # Qwen, DeepSeek, Mixtral · gpt-oss, Llama 4
SELECTION = ("gate.e_score_correction_bias", "e_score_correction_bias")


@dataclass(frozen=True)
class MoeWeights:
    """One block. w13 [E, 2I, H] has gate rows, then up rows, and alpha [E, 2]: one for each half, never
    merged; without a gate (relu2) it is [E, I, H] with alpha [E]."""

    w13: Nvfp4Tensor | Mxfp4Tensor
    w2: Nvfp4Tensor | Mxfp4Tensor  # [E, H, I]
    gated: bool
    compute: str  # nvfp4 | bf16
    w13_bias: Tensor | None = None  # [E, 2I]
    w2_bias: Tensor | None = None  # [E, H]
    router: Tensor | None = None  # [all experts, H]
    router_bias: Tensor | None = None
    selection_bias: Tensor | None = None
    expert_of_token: Tensor | None = None  # [vocabulary, k]: DeepSeek-V4's first layers look experts up
    first_expert: int = 0

    @property
    def gate(self) -> Nvfp4Tensor | Mxfp4Tensor | None:
        return self._half(0) if self.gated else None

    @property
    def up(self) -> Nvfp4Tensor | Mxfp4Tensor:
        return self._half(1) if self.gated else self.w13

    @property
    def down(self) -> Nvfp4Tensor | Mxfp4Tensor:
        return self.w2

    def biases(self) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """(gate, up, down) for Nvfp4MoE.load_biases, or None."""
        if self.w13_bias is None:
            return None
        parts = self.w13_bias.chunk(2, -1) if self.gated else (None, self.w13_bias)
        return (*parts, self.w2_bias)

    def to_nvfp4(self, method: str = "best") -> "MoeWeights":
        """MXFP4 -> NVFP4, an expert's gate and up with one alpha; NVFP4 stays what it is."""
        w13, w2 = self.w13, self.w2
        if isinstance(w13, Mxfp4Tensor):
            w13 = w13.to_nvfp4(method)
            w13 = replace(w13, alpha=w13.alpha[:, None].repeat(1, 2)) if self.gated else w13
        return replace(self, w13=w13, w2=w2.to_nvfp4(method) if isinstance(w2, Mxfp4Tensor) else w2)

    def _half(self, half: int) -> Nvfp4Tensor | Mxfp4Tensor:
        I = self.w13.packed.shape[1] // 2
        rows = slice(half * I, (half + 1) * I)
        if isinstance(self.w13, Mxfp4Tensor):
            return Mxfp4Tensor(self.w13.packed[:, rows], self.w13.e8m0[:, rows])
        return Nvfp4Tensor(self.w13.packed[:, rows], self.w13.sf[:, rows], self.w13.alpha[:, half])


def find_moe_layers(modules: Mapping[str, Module]) -> dict[str, dict]:
    """prefix -> {(expert, part): module} for experts of their own, {part: module} for stacked ones."""
    layers: dict[str, dict] = {}
    for name in modules:
        if m := EXPERT.fullmatch(name):
            layers.setdefault(m[1], {})[int(m[2]), PART[m[3]]] = name
        elif m := STACKED.fullmatch(name):
            layers.setdefault(m[1] or m[3], {})[
                "down" if m[2] == "down_proj" or m[4] == "mlp2_weight" else "gate_up"
            ] = name
    return layers


def assemble(checkpoint, prefix: str, parts: dict, experts: range | None) -> MoeWeights:
    modules = [checkpoint.modules[name] for name in parts.values()]
    for key, values in (("kind", {m.kind for m in modules}), ("compute", {m.compute for m in modules})):
        if len(values) > 1:
            raise CheckpointError(f"{prefix}: experts differ in {key}: {' and '.join(sorted(values))}")
    scaled = next((m for m in modules if "pre_quant_scale" in m.tensors), None)
    if scaled:
        raise CheckpointError(
            f"{scaled.tensors['pre_quant_scale']}: AWQ's scale of activations; no MoE layer here applies it"
        )
    stacked = {isinstance(key, str) for key in parts}
    if len(stacked) > 1:
        raise CheckpointError(f"{prefix}.experts: some are stacked, some are stored one by one")
    count = modules[0].experts if True in stacked else 1 + max(expert for expert, _ in parts)
    wanted = range(count) if experts is None else experts
    if wanted.step != 1 or not 0 <= wanted.start < wanted.stop <= count:
        raise CheckpointError(f"{prefix}: experts must be a range within 0 .. {count}, got {experts}")
    fields = (_stacked if True in stacked else _gathered)(checkpoint, prefix, parts, wanted)
    _fit(prefix, fields)
    return MoeWeights(
        compute=modules[0].compute, first_expert=wanted.start,
        **fields, **_router(checkpoint.shards, prefix, modules[0].dialect.name == "gpt-oss-mxfp4"),
    )  # fmt: skip


def _fit(prefix: str, fields: dict) -> None:
    (E, rows, H), down = fields["w13"].shape, fields["w2"].shape
    I = rows // 2 if fields["gated"] else rows
    if tuple(down) != (E, H, I):
        raise CheckpointError(
            f"{prefix}.experts: gate and up are [{E}, {I}, {H}], so down must be [{E}, {H}, {I}],"
            f" got {list(down)}"
        )
    if (fields["w13_bias"] is None) != (fields["w2_bias"] is None):
        raise CheckpointError(f"{prefix}.experts: gate and up have a bias and down none, or the other way")


def _gathered(checkpoint, prefix: str, parts: dict, wanted: range) -> dict:
    """Experts stored one by one."""
    gated = any(part == "gate" for _, part in parts)
    names = ("gate", "up", "down") if gated else ("up", "down")
    for expert in wanted:
        for part in names:
            if (expert, part) not in parts:
                raise CheckpointError(
                    f"{prefix}.experts.{expert}: {part} is missing; others of {len(parts)} are there"
                )
    loaded = {
        p: _same([checkpoint.weight(parts[e, p]) for e in wanted], f"{prefix}.experts.*: {p}") for p in names
    }
    if gated:
        _same([loaded["gate"][0], loaded["up"][0]], f"{prefix}.experts.*: gate and up")
    biases = [_biases([checkpoint.bias(parts[e, p]) for e in wanted], f"{prefix}: {p}") for p in names]
    if sum(bias is None for bias in biases[:-1]) == 1 and gated:
        raise CheckpointError(f"{prefix}.experts: gate has a bias and up none, or the other way")
    return {
        "w13": _cat([_stack(loaded[p]) for p in names[:-1]]),
        "w2": _stack(loaded["down"]),
        "gated": gated,
        "w13_bias": None if biases[0] is None else torch.cat(biases[:-1], -1),
        "w2_bias": biases[-1],
    }


def _biases(found: list[Tensor | None], what: str) -> Tensor | None:
    """float32 [E, N]"""
    if any(bias is None for bias in found):
        if any(bias is not None for bias in found):
            raise CheckpointError(f"{what}: some experts have a bias, some have none")
        return None
    return torch.stack(found).float()


def _stacked(checkpoint, prefix: str, parts: dict, wanted: range) -> dict:
    """All experts in one tensor. gpt-oss interleaves gate and up rows; Llama 4 has gate rows, then up
    rows."""
    for part in ("gate_up", "down"):
        if part not in parts:
            raise CheckpointError(f"{prefix}.experts: {part}_proj is missing")
    picked = slice(wanted.start, wanted.stop)
    gate_up, down = (checkpoint.rows_as_stored(parts[p], experts=picked) for p in ("gate_up", "down"))
    w13_bias, w2_bias = (checkpoint.bias(parts[p]) for p in ("gate_up", "down"))
    w13_bias, w2_bias = (None if b is None else b[picked].float() for b in (w13_bias, w2_bias))
    if isinstance(gate_up, Nvfp4Tensor) and gate_up.alpha.dim() == 1:
        gate_up = replace(gate_up, alpha=gate_up.alpha[:, None].repeat(1, 2))
    if checkpoint.interleaves_gate_up(parts["gate_up"]):
        order = torch.arange(gate_up.packed.shape[1]).view(-1, 2).T.flatten()  # even rows, then odd rows
        gate_up = _map(gate_up, lambda rows: rows.view(torch.uint8)[:, order])
        w13_bias = None if w13_bias is None else w13_bias[:, order]
    return {"w13": gate_up, "w2": down, "gated": True, "w13_bias": w13_bias, "w2_bias": w2_bias}


def _router(shards, prefix: str, oss: bool) -> dict:
    def first(*names: str) -> Tensor | None:
        return next((shards[f"{prefix}.{n}"] for n in names if f"{prefix}.{n}" in shards), None)

    # gate.bias: in OpenAI's own names a bias of the logits, in DeepSeek-V4 one of the selection
    return {
        "router": first(*(f"{r}.weight" for r in ROUTERS)),
        "router_bias": first("router.bias", *["gate.bias"] * oss),
        "selection_bias": first(*SELECTION, *["gate.bias"] * (not oss)),
        "expert_of_token": first("gate.tid2eid"),
    }


def _map(w, rows):
    if isinstance(w, Mxfp4Tensor):
        return Mxfp4Tensor(rows(w.packed), rows(w.e8m0))
    return Nvfp4Tensor(rows(w.packed), rows(w.sf).view(torch.float8_e4m3fn), w.alpha)


def _same(weights: list, what: str) -> list:
    for w in weights:
        if w.shape != weights[0].shape:
            raise CheckpointError(f"{what} has shape {list(w.shape)} and {list(weights[0].shape)}")
    return weights


def _stack(weights: list):
    packed = torch.stack([w.packed for w in weights])
    if isinstance(weights[0], Mxfp4Tensor):
        return Mxfp4Tensor(packed, torch.stack([w.e8m0 for w in weights]))
    sf = torch.stack([w.sf.view(torch.uint8) for w in weights]).view(torch.float8_e4m3fn)
    return Nvfp4Tensor(packed, sf, torch.stack([w.alpha for w in weights]))


def _cat(halves: list):
    """Rows of gate, then of up; alpha [E, 2]."""
    if len(halves) == 1:
        return halves[0]
    packed = torch.cat([h.packed for h in halves], 1)
    if isinstance(halves[0], Mxfp4Tensor):
        return Mxfp4Tensor(packed, torch.cat([h.e8m0 for h in halves], 1))
    sf = torch.cat([h.sf.view(torch.uint8) for h in halves], 1).view(torch.float8_e4m3fn)
    return Nvfp4Tensor(packed, sf, torch.stack([h.alpha for h in halves], -1))

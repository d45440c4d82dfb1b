"""Checkpoint: the quantized modules of a directory, one at a time, in the library's own convention."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from ..tensor import Mxfp4Tensor, Nvfp4Tensor
from .claims import METHODS, is_gpt_oss, read_claims
from .dialects import GROUP, NVFP4, SUFFIXES, Module, check_multipliers, find_modules, refusal
from .header import FLOATS, CheckpointError, no_collection
from .moe import MoeWeights, assemble, find_moe_layers
from .shards import Shards


@dataclass(frozen=True)
class Format:
    name: str  # a dialect's, quark-nvfp4, deepseek-v4-nvfp4 or unquantized
    kind: str | None  # nvfp4 | mxfp4, of most modules


def open_checkpoint(path, strict: bool = True) -> "Checkpoint":
    """Read every header under `path` and say what is there; no weight is touched.

    strict: an incomplete or contradictory module is an error. Otherwise it is left out and listed in
    `errors`."""
    checkpoint = Checkpoint(Shards(path))
    if strict and checkpoint.errors:
        more = f" (and {len(checkpoint.errors) - 1} more)" if len(checkpoint.errors) > 1 else ""
        raise CheckpointError(f"{path}: {checkpoint.errors[0]}{more}")
    return checkpoint


class Checkpoint:
    """weight(name) and moe(prefix) are the two ways in; `modules` says what there is."""

    def __init__(self, shards: Shards):
        self.shards = shards
        self.errors: list[str] = []
        self.warnings = list(shards.warnings)
        why = refusal(shards.tensors, shards.metadata)
        if why:
            raise CheckpointError(f"{shards.path}: {why}")
        self.claims = read_claims(shards.config, shards.quant_config)
        with no_collection():
            found = find_modules(shards.tensors, self.errors, self.claims.group_size)
            for name, module in found.items():
                compute = self.claims.compute(name, module.kind, "input_scale" in module.tensors)
                found[name] = replace(module, compute=compute)
        self.modules: Mapping[str, Module] = MappingProxyType(found)
        self.format = self._format()
        self._find_orphans()
        self._compare_with_config()

    def weight(self, name: str, check: bool = True, experts: int | slice | None = None):
        """Nvfp4Tensor or Mxfp4Tensor [.., N, K]; of a stacked module one expert [N, K] or several, if asked.

        check: scales that make no sense (NaN, negative, Inf) are an error that names the tensor."""
        weight = self.rows_as_stored(name, check, experts)
        # an alpha for each half, and no halves: only moe() and convert know which row is whose
        halves = isinstance(weight, Nvfp4Tensor) and weight.alpha.dim() == weight.packed.dim() - 1
        if halves and self.interleaves_gate_up(name):
            raise CheckpointError(f"{name}: gate and up are interleaved, each with an alpha: use moe()")
        return weight

    def rows_as_stored(self, name: str, check: bool = True, experts: int | slice | None = None):
        """weight(), whose alpha [.., 2] may be of interleaved rows."""
        module = self._module(name)
        if experts is not None and module.experts is None:
            raise CheckpointError(f"{name}: not stacked, so it has no expert {experts}")
        packed = self._rows_of(module, "packed", experts, 2)
        if module.kind == NVFP4:
            sf = self._rows_of(module, "sf", experts, module.group)
            wider = module.group // GROUP[NVFP4]
            sf = sf.repeat_interleave(wider, -1) if wider > 1 else sf
            alpha = self.multiplier(name, "alpha")
            alpha = alpha if experts is None else alpha[experts]
            weight = Nvfp4Tensor(packed, sf.view(torch.float8_e4m3fn), alpha)
        else:
            weight = Mxfp4Tensor(packed, self._rows_of(module, "e8m0", experts, module.group))
        if check:
            self._check(module, weight)
        return weight

    def bias(self, name: str) -> Tensor | None:
        role = self._module(name).tensors.get("bias")
        return None if role is None else self.shards[role]

    def input_scale(self, name: str) -> Tensor | None:
        """amax / 2688 of the calibration's activations, a multiplier; [] or one for each expert."""
        return self.multiplier(name, "input_scale")

    def interleaves_gate_up(self, name: str) -> bool:
        """Whether gate is rows 0::2 and up rows 1::2."""
        module = self._module(name)
        oss = module.dialect.name == "gpt-oss-mxfp4" or is_gpt_oss(self.shards.config)
        return oss and name.endswith(("gate_up_proj", "mlp1_weight"))

    def plain(self) -> Iterable[str]:
        """Tensors that belong to no quantized module."""
        return (name for name in self.shards if name not in self._owned)

    def moe_layers(self) -> Iterable[str]:
        return iter(self._moe_layers)

    def moe(self, prefix: str, experts: range | None = None) -> MoeWeights:
        """One MoE block, stacked over its experts (or over `experts` of them)."""
        if prefix not in self._moe_layers:
            known = ", ".join(list(self._moe_layers)[:3])
            raise CheckpointError(f"{self.shards.path}: no MoE block {prefix!r}; there are {known}, ..")
        return assemble(self, prefix, self._moe_layers[prefix], experts)

    @cached_property
    def _moe_layers(self):
        return find_moe_layers(self.modules)

    @cached_property
    def _owned(self) -> set[str]:
        return {tensor for module in self.modules.values() for tensor in module.tensors.values()}

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            raise CheckpointError(f"{self.shards.path}: no quantized module {name!r}")
        return self.modules[name]

    def _rows_of(self, module: Module, role: str, experts: int | slice | None, per_byte: int) -> Tensor:
        """Codes or scales as bytes [.., N, K / per_byte]."""
        # as bytes: torch converts the value of a float8_e8m0fnu, and we want its exponent
        name, N, K = module.tensors[role], *module.shape
        stored = (self.shards[name] if experts is None else self.shards.rows(name, experts)).view(torch.uint8)
        if module.dialect.layout == "columns":
            return stored.transpose(-1, -2).contiguous()
        lead = () if module.experts is None or isinstance(experts, int) else (-1,)
        return stored.reshape(*lead, N, K // per_byte)

    def multiplier(self, name: str, role: str) -> Tensor | None:
        """alpha or input_scale, float32 [], [E] or [E, 2] (gate rows, up rows)."""
        module = self._module(name)
        if role not in module.tensors:
            return None
        tensor = module.tensors[role]
        check_multipliers(tensor, self.shards.tensors[tensor], module.experts, FLOATS)
        value = self.shards[tensor].float().flatten()
        value = value.reciprocal() if module.dialect.inverse else value
        lead = () if module.experts is None else (module.experts,)
        if value.numel() == 1:
            return value.reshape(()).expand(lead).clone()
        return value.reshape(*lead, -1).squeeze(-1).clone()

    def _check(self, module: Module, weight: Nvfp4Tensor | Mxfp4Tensor) -> None:
        if module.kind == NVFP4:
            wrong = weight.sf.view(torch.uint8) >= 0x7F
            what, role = "a NaN or negative block scale", "sf"
            # of the whole module. 0 is a tensor of zeros; as a divisor, and if tiny, it has no inverse
            alpha, stored = self.multiplier(module.name, "alpha"), self.shards[module.tensors["alpha"]]
            if not (alpha.isfinite() & stored.isfinite() & (stored >= 0)).all():
                got = stored.flatten()[:8].tolist()
                raise CheckpointError(f"{module.tensors['alpha']}: must be finite and positive, got {got}")
        else:
            wrong = weight.e8m0 == 0xFF
            what, role = "a NaN block scale (0xFF)", "e8m0"
            if wrong.any():  # on a block of zeros it says nothing
                wrong &= (weight.packed.unflatten(-1, (-1, 16)) & 0x77 != 0).any(-1)
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            at[-1] //= module.group // GROUP[module.kind]  # where it lies in the file
            at = [*at[:-2], at[-1], at[-2]] if module.dialect.layout == "columns" else at
            raise CheckpointError(
                f"{module.tensors[role]}: {what} at {at}, {int(wrong.sum())} of {wrong.numel()}"
            )

    def _format(self) -> Format:
        counts = Counter((m.dialect.name, m.kind) for m in self.modules.values())
        if not counts:
            return Format("unquantized", None)
        name, kind = counts.most_common(1)[0][0]
        if name != "modelopt-nvfp4":
            return Format(name, kind)
        if self.claims.method == "quark":
            return Format("quark-nvfp4", kind)
        # DeepSeek-V4's export keeps FP8 weights with `.scale` beside ModelOpt's names
        fp8 = any(i.dtype == "F8_E8M0" and n.endswith(".scale") for n, i in self.shards.tensors.items())
        v4 = self.claims.method == "fp8" or fp8 or "deepseek_v4" in str(self.shards.config.get("model_type"))
        return Format("deepseek-v4-nvfp4" if v4 else name, kind)

    def _find_orphans(self) -> None:
        """Codes without scales and scales without codes: an index-driven reader would have loaded garbage."""
        named = {error.split(":")[0] for error in self.errors}
        for name, info in self.shards.tensors.items():
            codes = info.dtype == "U8" and name.endswith((".weight", ".weight_packed", "_blocks", ".blocks"))
            scales = name.endswith((".weight_scale", "_weight_scale")) and info.dtype == "F8_E4M3"
            scales |= name.endswith((".weight_scale_2", ".weight_global_scale"))
            if not (codes or scales) or name in self._owned:
                continue
            if name in named or any(name.removesuffix(s) in named for s in SUFFIXES):
                continue  # of a module whose fault is known
            what = "packed codes without block scales" if codes else "a scale without packed codes"
            self.errors.append(f"{name}: {what} ({info.dtype} {list(info.shape)})")

    def _compare_with_config(self) -> None:
        method, name = self.claims.method, self.format.name
        if method in METHODS and self.modules and name not in METHODS[method]:
            self.warnings.append(
                f"config says quant_method {method}, the tensors are {name}: they are believed"
            )
        if self.modules and method is None:
            self.warnings.append("no config says how this checkpoint is quantized: the tensors do")
        if not self.modules and method in ("modelopt", "compressed-tensors", "mxfp4", "quark"):
            self.warnings.append(f"config says quant_method {method}, no FP4 weights were found")
        group = self.claims.group_size
        wanted = {m.group for m in self.modules.values()}
        if group is not None and wanted and group not in wanted:
            self.warnings.append(f"config says group_size {group}, the tensors say {min(wanted)}")
        # DeepSeek-V4's NVFP4 export excludes what stays MXFP4
        asked = [n for n, m in self.modules.items() if method != "fp8" or m.kind == NVFP4]
        odd = [(n, entry) for n in asked if (entry := self.claims.excludes(n))]
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            self.warnings.append(f"{odd[0][0]}{more}: quantized, though config excludes it ({odd[0][1]})")
        for entry, why in (self.claims.exclusions.refused | self.claims.targets.refused).items():
            self.warnings.append(f"config: {entry[:100]!r} is not applied: {why}")

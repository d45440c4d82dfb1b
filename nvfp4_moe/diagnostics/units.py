"""A checkpoint as a stream of matrices: one expert's projection at a time, with bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError, Module
from ..checkpoint.ahead import run_ahead
from ..checkpoint.dialects import NVFP4
from ..checkpoint.names import PART
from .faults import Collector
from .statistics import Exponents, Table, block_table, exponents

RELEASE = 1 << 28  # bytes read before the mapped pages are let go


@dataclass
class Unit:
    """One matrix [N, K]. What is kept of it is small: a checkpoint has up to half a million."""

    module: Module
    expert: int | None  # the index in a stacked tensor
    alpha: list[float]  # multipliers: one, or gate's and up's; none for MXFP4
    input_scale: float | None
    top: int = 0  # the largest scale byte of a live block
    powers: bool = False  # every scale is a power of two
    dead: bool = False  # every code is zero
    exponents: Exponents | None = None  # MXFP4, and not dead

    @property
    def name(self) -> str:
        return self.module.name + ("" if self.expert is None else f"[{self.expert}]")

    def tensor(self, role: str) -> str:
        """The full tensor name of a role, with the expert where it is stacked."""
        return self.module.tensors[role] + ("" if self.expert is None else f"[{self.expert}]")

    @property
    def nvfp4(self) -> bool:
        return self.module.kind == NVFP4

    @property
    def parent(self) -> str:
        return self.module.name.rpartition(".")[0]

    @property
    def last(self) -> str:
        return self.module.name.rpartition(".")[2]

    @property
    def part(self) -> str | None:
        """gate, up or down."""
        return PART.get(self.last)


def find_units(checkpoint: Checkpoint, found: Collector) -> list[Unit]:
    """In the order of the files, so that disks read forward."""

    def position(module: Module):
        info = checkpoint.shards.tensors[module.tensors["packed"]]
        return str(info.file), info.begin

    units = []
    for module in sorted(checkpoint.modules.values(), key=position):
        alphas = _multipliers(checkpoint, module, "alpha", found)
        inputs = _multipliers(checkpoint, module, "input_scale", found)
        for expert in range(module.experts) if module.experts is not None else (None,):
            mine = expert or 0
            scale = inputs[mine][0] if inputs else None
            units.append(Unit(module, expert, alphas[mine] if alphas else [], scale))
    return units


def _multipliers(checkpoint: Checkpoint, module: Module, role: str, found: Collector) -> list[list[float]]:
    """A row for each expert (or one row): one value, or gate's and up's."""
    try:
        value = checkpoint.multiplier(module.name, role)
    except CheckpointError as error:
        name, _, what = str(error).partition(" must be ")
        found.add("wrong-layout", name, f"must be {what}")
        return []
    return [] if value is None else value.reshape(module.experts or 1, -1).tolist()


def read_unit(checkpoint: Checkpoint, unit: Unit) -> tuple[Tensor, Tensor]:
    """(packed uint8 [N, K/2], scale bytes uint8 [N, blocks]) of one unit; views of the file where its layout
    allows."""
    weight = checkpoint.rows_as_stored(unit.module.name, check=False, experts=unit.expert)
    return weight.packed, (weight.sf if unit.nvfp4 else weight.e8m0).view(torch.uint8)


def _read(checkpoint: Checkpoint, unit: Unit) -> tuple[Table, Tensor, Tensor]:
    packed, scales = read_unit(checkpoint, unit)
    return block_table(packed, scales), packed, scales


def stream(
    checkpoint: Checkpoint, units: list[Unit], progress=None
) -> Iterator[tuple[Unit, Table, Tensor, Tensor]]:
    """(unit, its table, codes, scales), a unit at a time. progress(bytes done, bytes in all)."""
    total, done, held = sum(_nbytes(unit) for unit in units), 0, 0
    tasks = ((unit, partial(_read, checkpoint, unit)) for unit in units)
    for unit, (table, packed, scales) in run_ahead(tasks):
        unit.dead = int(table.codes[[c for c in range(16) if c & 7]].sum()) == 0
        unit.exponents = None if unit.nvfp4 else exponents(table)
        yield unit, table, packed, scales
        done, held = done + _nbytes(unit), held + _nbytes(unit)
        if progress is not None:
            progress(done, total)
        if held > RELEASE:  # or a large checkpoint's pages would all stay in this process's memory
            checkpoint.shards.release()
            held = 0


def _nbytes(unit: Unit) -> int:
    N, K = unit.module.shape
    return N * K // 2 + N * K // unit.module.group

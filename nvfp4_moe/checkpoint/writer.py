"""ShardWriter: safetensors files written in a way that a crash cannot spoil.

Everything is known before the first byte: names, types and shapes of all tensors, so also the files, their
headers and where each tensor goes. A file is written under a temporary name, synced and renamed; the index
and the config follow the last one. While the journal is in the directory, nothing takes it for a checkpoint:
our reader refuses it by name, and the others find no config.json. A second run with the same plan goes on
where the first one stopped.
"""

import ctypes
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .header import BITS, NAMES, CheckpointError, header_bytes, parse_json, read_header
from .shards import INDEX, JOURNAL

SHARD_BYTES = 5 * 10**9  # Hugging Face's usual limit
PARTIAL = ".partial"


@dataclass
class _Shard:
    path: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # name -> dtype, shape
    nbytes: int = 0
    fd: int | None = None  # of the partial file

    def open(self) -> None:
        """Create the partial file at its whole length, header first."""
        header = header_bytes(self.tensors, {"format": "pt"})
        self.offsets, at = {}, len(header)
        for name, (dtype, shape) in self.tensors.items():
            self.offsets[name] = at
            at += prod(shape) * BITS[dtype] // 8
        self.waiting = set(self.tensors)
        self.fd = os.open(
            self.path.with_name(self.path.name + PARTIAL), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
        )
        os.truncate(self.fd, at)
        _write(self.fd, header, 0)

    def finish(self) -> None:
        os.fsync(self.fd)
        self.abandon()
        os.replace(self.path.with_name(self.path.name + PARTIAL), self.path)
        sync_directory(self.path.parent)

    def abandon(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def is_done(self) -> bool:
        if not self.path.exists():
            return False
        try:
            there = read_header(self.path)[0]
        except CheckpointError:
            return False
        return {name: (info.dtype, info.shape) for name, info in there.items()} == self.tensors


class ShardWriter:
    """plan: (name, safetensors dtype or torch dtype, shape) of every tensor, in the order they should lie.
    `with ShardWriter(..) as writer` lets the directory go at the end, whatever happened.

    add() takes them in any order, but files stay open until they are full: keep to the plan's order. `files`
    holds what else the directory gets at the end (config.json, ..): name -> bytes, or a path to copy."""

    def __init__(
        self,
        path,
        plan: Iterable[tuple[str, str | torch.dtype, tuple[int, ...]]],
        files: Mapping[str, bytes | Path] | None = None,
        max_shard_bytes: int = SHARD_BYTES,
        source: str = "",
    ):
        self.path, self.files = Path(path), dict(files or {})
        self._shards = _distribute(self.path, plan, max_shard_bytes)
        self._home = {name: shard for shard in self._shards for name in shard.tensors}
        described = [[s.path.name, list(s.tensors.items())] for s in self._shards]
        digest = hashlib.sha256(json.dumps([source, described]).encode()).hexdigest()
        self._begin(digest)
        self._done = {shard.path for shard in self._shards if shard.is_done()}

    def missing(self) -> list[str]:
        """Names still to add, in the plan's order; after a crash, those of the files that were not
        finished."""
        return [name for name, shard in self._home.items() if shard.path not in self._done]

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; one that is in a finished file already is passed over."""
        shard = self._home.get(name)
        if shard is None:
            raise CheckpointError(f"{self.path}: {name!r} is not in the plan")
        if shard.path in self._done:
            return
        dtype, shape = shard.tensors[name]
        got = (NAMES[tensor.dtype], logical_shape(tensor))
        if got != (dtype, shape):
            raise CheckpointError(
                f"{self.path}: {name!r} was planned as {dtype} {list(shape)}, got {got[0]} {list(got[1])}"
            )
        if shard.fd is None:
            shard.open()
        if name not in shard.waiting:
            raise CheckpointError(f"{self.path}: {name!r} was added twice")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        # by address: torch needs numpy for a view of a tensor's bytes, and we need no numpy
        view = (ctypes.c_char * data.numel()).from_address(data.data_ptr()) if data.numel() else b""
        _write(shard.fd, view, shard.offsets[name])
        shard.waiting.discard(name)
        if not shard.waiting:
            shard.finish()
            self._done.add(shard.path)

    def close(self) -> None:
        """Side files, then the index, and the journal goes: from here on it is a checkpoint."""
        missing = self.missing()
        if missing:
            raise CheckpointError(f"{self.path}: {missing[0]!r} and {len(missing) - 1} more were never added")
        if len(self._shards) > 1:
            write_atomically(self.path / INDEX, self._index())
        for name in sorted(
            self.files, key=lambda name: name == "config.json"
        ):  # which makes it a model, last
            content = self.files[name]
            write_atomically(
                self.path / name, content if isinstance(content, bytes) else Path(content).read_bytes()
            )
        os.unlink(self.path / JOURNAL)
        sync_directory(self.path)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        """Finished or not: another writer may go on."""
        self._lock.close()
        for shard in self._shards:
            shard.abandon()

    def _index(self) -> bytes:
        where = {name: shard.path.name for name, shard in sorted(self._home.items())}
        total = sum(shard.nbytes for shard in self._shards)
        return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode() + b"\n"

    def _begin(self, digest: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        journal = self.path / JOURNAL
        if journal.exists():
            if parse_json(journal, journal.read_bytes(), JOURNAL).get("plan") != digest:
                raise CheckpointError(
                    f"{self.path}: holds an unfinished conversion of another source or with other options:"
                    " delete the directory or choose another"
                )
        elif any(not p.name.endswith(PARTIAL) for p in self.path.iterdir()):
            raise CheckpointError(f"{self.path}: not empty; nothing is ever overwritten")
        else:
            write_atomically(journal, json.dumps({"plan": digest}).encode())
        self._lock = _locked(journal)


def _locked(journal: Path) -> BinaryIO:
    """Ours alone while it is open: two processes that write the same shards would tear each other's."""
    file = open(journal, "rb")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(file.fileno()), os.stat(journal))
    except BlockingIOError:
        mine = False
    except OSError:  # a file system without locks
        return file
    if not mine:  # or another process wrote the journal after we had opened it
        file.close()
        raise CheckpointError(f"{journal.parent}: another conversion is writing it")
    return file


def logical_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape the header gives: torch counts bytes of float4, the file values."""
    shape = tuple(tensor.shape)
    return (*shape[:-1], 2 * shape[-1]) if tensor.dtype == torch.float4_e2m1fn_x2 else shape


def _distribute(path: Path, plan, limit: int) -> list[_Shard]:
    shards, seen = [_Shard(path)], set()
    for name, dtype, shape in plan:
        dtype = NAMES[dtype] if isinstance(dtype, torch.dtype) else dtype
        if name in seen:
            raise CheckpointError(f"{path}: {name!r} is in the plan twice")
        seen.add(name)
        nbytes = prod(shape) * BITS[dtype] // 8
        if shards[-1].tensors and shards[-1].nbytes + nbytes > limit:
            shards.append(_Shard(path))
        shards[-1].tensors[name] = (dtype, tuple(shape))
        shards[-1].nbytes += nbytes
    for i, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        shard.path = path / name
    return shards


def write_atomically(path: Path, content: bytes) -> None:
    """The old file or the new one, never a part."""
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(fd: int, data, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written

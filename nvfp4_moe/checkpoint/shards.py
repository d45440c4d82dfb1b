"""Shards: a directory of safetensors files as one mapping from names to tensors, lazy and memory-mapped.

What exists is what the shards' headers say. The index is only compared with them: indexes in the wild lack
tensors or count bytes that are gone.
"""

import mmap
import re
import sys
import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import torch
from torch import Tensor

from .header import DTYPES, CheckpointError, TensorInfo, no_collection, open_regular, parse_json, read_header

INDEX = "model.safetensors.index.json"
JOURNAL = "nvfp4-unfinished.json"  # of ShardWriter: while it is there, the directory is not a checkpoint
MAX_JSON = 256 << 20  # bytes; the index of 500,000 tensors has about 60 MB
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Copy on write, and without a reservation: Linux would refuse to map more than the machine's memory.
_PRIVATE = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)  # MAP_NORESERVE, named since 3.13
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class Shards(Mapping):
    """`shards[name]` is a tensor over the file's pages: nothing is read until it is used. `warnings`: what is
    odd and harmless."""

    def __init__(self, path):
        self.path = Path(path)
        self.warnings: list[str] = []
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: not a directory of *.safetensors files")
        if (self.path / JOURNAL).exists():
            raise CheckpointError(
                f"{self.path}: an unfinished conversion ({JOURNAL} is there): run the same command again"
            )
        self.files = self._find_files()
        self.config = self._read_json("config.json") or {}
        self.quant_config = self._read_json("hf_quant_config.json")
        self.metadata: dict[str, dict[str, str]] = {}
        with no_collection():
            self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._read_headers())
            self.index = self._read_json(INDEX)
            self._check_index()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name) -> bool:
        return name in self.tensors

    def get(self, name: str, default=None):
        return self[name] if name in self.tensors else default

    def __getitem__(self, name: str) -> Tensor:
        """Copy-on-write pages of the file: a write to the tensor never reaches the disk."""
        info = self._info(name)
        return self._view(name, info, info.begin, info.shape)

    def rows(self, name: str, index: int | slice) -> Tensor:
        """`shards[name][index]` of the first dimension, touching no other bytes."""
        info = self._info(name)
        if not info.shape:
            raise CheckpointError(f"{info.file}: {name!r} is a scalar and has no rows")
        count, row = info.shape[0], info.nbytes // max(info.shape[0], 1)
        picked = range(count)[index]
        if isinstance(picked, int):
            return self._view(name, info, info.begin + picked * row, info.shape[1:])
        if picked.step != 1:
            return self[name][index]
        return self._view(name, info, info.begin + picked.start * row, (len(picked), *info.shape[1:]))

    def release(self) -> None:
        """Forget the mappings: pages go when the last tensor over them goes."""
        with self._lock:
            self._maps.clear()

    def place(self, name: str) -> tuple[str, int]:
        """Sorts tensors as they lie on the disk."""
        info = self._info(name)
        return info.file.name, info.begin

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name!r}")
        return self.tensors[name]

    def _view(self, name: str, info: TensorInfo, begin: int, shape: tuple[int, ...]) -> Tensor:
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{info.file}: {name!r} is {info.dtype}, for which torch has no type")
        dtype = DTYPES[info.dtype]
        if info.dtype == "F4":  # torch counts bytes where the file counts values
            if not shape or shape[-1] % 2:
                raise CheckpointError(f"{info.file}: {name!r} is F4 {list(shape)}: an odd last dimension")
            shape = (*shape[:-1], shape[-1] // 2)
        nbytes = prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        pages = self._map(info.file)
        if begin + nbytes > len(pages):
            raise CheckpointError(f"{info.file}: shrank to {len(pages)} bytes since it was opened")
        data = torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=begin)
        if data.data_ptr() % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(shape)

    def _map(self, file: Path) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                with open(file, "rb") as f:
                    self._maps[file] = mmap.mmap(f.fileno(), 0, flags=_PRIVATE, prot=_READ_WRITE)
            return self._maps[file]

    def _find_files(self) -> tuple[Path, ...]:
        names = sorted(p for p in self.path.iterdir() if not p.name.startswith("."))
        files = tuple(self.inside(p) for p in names if p.suffix == ".safetensors")
        pickles = [p.name for p in names if p.suffix in PICKLES and p.name != "training_args.bin"]
        if not files and pickles:
            raise CheckpointError(
                f"{self.path}: only pickles ({pickles[0]}); reading a pickle runs the code in it, so they"
                " are not read: convert them to safetensors"
            )
        if not files:
            raise CheckpointError(f"{self.path}: no *.safetensors files")
        if pickles:
            self.warnings.append(f"pickles are not read: {', '.join(pickles[:4])}")
        counted = {}
        for file in files:
            if m := re.fullmatch(r"(.+)-(\d{5,})-of-(\d{5,})\.safetensors", file.name):
                counted.setdefault((m[1], int(m[3])), set()).add(int(m[2]))
        for (stem, count), there in counted.items():
            missing = next((i for i in range(1, min(count, len(there)) + 1) if i not in there), None)
            missing = len(there) + 1 if missing is None and len(there) < count else missing
            if missing:
                raise CheckpointError(
                    f"{self.path}: {stem}-{missing:05d}-of-{count:05d}.safetensors is missing: {len(there)}"
                    f" of {count} shards are there"
                )
        return files

    def inside(self, path: Path) -> Path:
        """`path` if it is in the directory, following links only within it or within the hub's cache."""
        if path.is_symlink():
            home, target = self.path.resolve(), path.resolve()
            cache = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
            if not (target.is_relative_to(home) or target.is_relative_to(cache)):
                raise CheckpointError(
                    f"{path}: a link out of the directory, to {target}: pass the directory it is in"
                )
        return path

    def _read_json(self, name: str) -> dict | None:
        path = self.path / name
        if not path.is_file():
            return None
        with open_regular(self.inside(path)) as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise CheckpointError(f"{path}: more than {MAX_JSON} bytes")
        return parse_json(path, text, name)

    def _read_headers(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            found, self.metadata[file.name] = read_header(file)
            doubled = tensors.keys() & found.keys()
            if doubled:
                name = min(doubled)
                raise CheckpointError(f"{name!r} is both in {tensors[name].file} and in {file}")
            tensors |= found
        return tensors

    def _check_index(self) -> None:
        if self.index is None:
            if len(self.files) > 1:
                self.warnings.append(f"{len(self.files)} shards and no {INDEX}")
            return
        where = self.index.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise CheckpointError(f"{self.path / INDEX}: weight_map must map names to files")
        files = {file.name: file for file in self.files}
        for file in sorted(set(where.values())):
            if PurePosixPath(file).name != file or "\\" in file or file in ("", ".", ".."):
                raise CheckpointError(
                    f"{self.path / INDEX}: {file!r} is not the name of a file in this directory"
                )
            if file not in files:
                raise CheckpointError(f"{self.path / INDEX}: shard {file!r} is missing")
        index_says = {
            "the index lacks": [n for n in self.tensors if n not in where],
            "the index names, and no shard has": [n for n in where if n not in self.tensors],
            "the index puts into another shard": [
                n for n, f in where.items() if n in self.tensors and self.tensors[n].file != files[f]
            ],
        }
        for what, names in index_says.items():
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                self.warnings.append(f"{what} {names[0]}{more}")
        metadata = self.index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        real = sum(info.nbytes for info in self.tensors.values())
        if total is not None and total != real:
            self.warnings.append(f"the index says total_size {total}, the shards hold {real} bytes")

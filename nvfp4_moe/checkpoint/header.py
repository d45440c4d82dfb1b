"""safetensors' file format: the header, checked whole before a byte of data is touched.

8 bytes little-endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data. The checks are the format's own (no hole, no overlap, not a byte too many) and a few of ours: files come
from strangers.
"""

import gc
import json
import os
import stat
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_RANK = 16
KEYS = {"dtype", "shape", "data_offsets"}
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip  (torch has no 6-bit types)
FLOATS = ("BF16", "F16", "F32")  # of weights that are not quantized, and of scales
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAGICS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes: pickled",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a git-lfs pointer: the file itself was not downloaded",
    b"\x89HDF": "an HDF5 file",
}


@contextmanager
def no_collection():
    """While millions of objects are made, the cycle collector would walk over all of them again and again:
    27 s to open Kimi-K3's 497,220 tensors, 10 without (2 busy cores, 2026-11-21)."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it is: names the file, module or tensor, what was wanted, what
    came."""


class TensorInfo(NamedTuple):
    """Where a tensor lies. `shape` is logical: F4 counts values, not bytes."""

    file: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The start of a file that holds tensors {name: (dtype, shape)} in this order; its length is a multiple
    of 8."""
    begin, entries = 0, {"__metadata__": metadata} if metadata else {}
    for name, (dtype, shape) in tensors.items():
        end = begin + prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def open_regular(path: Path) -> BinaryIO:
    """To read; a pipe that somebody named model.safetensors must not hang us, so O_NONBLOCK."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: not a regular file")
    return open(fd, "rb")


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors, metadata) of one file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(24)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            magic = next((m for m in MAGICS if start.startswith(m)), None)
            what = (
                f"not a safetensors file but {MAGICS[magic]}"
                if magic
                else (
                    f"truncated, or not a safetensors file: it announces a header of {length} bytes"
                    f" (at most {MAX_HEADER}) and has {size} bytes"
                )
            )
            raise CheckpointError(f"{path}: {what}")
        file.seek(8)
        text = file.read(length)
    return parse_header(path, text, 8 + length, size)


def parse_header(
    path: Path, text: bytes, start: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    entries = parse_json(path, text, "header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    tensors = {name: _tensor_info(path, name, entry, start) for name, entry in entries.items()}
    at = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != at:
            kind = "overlaps the tensor before it" if info.begin < at else "leaves a hole before it"
            raise CheckpointError(f"{path}: {name!r} {kind}: begins at byte {info.begin}, wanted {at}")
        at = info.end
    if at != size:
        what = "truncated" if at > size else "bytes that no tensor owns"
        raise CheckpointError(f"{path}: {what}: the header describes {at} bytes, the file has {size}")
    return tensors, metadata


def _tensor_info(path: Path, name: str, entry, start: int) -> TensorInfo:
    """Called half a million times for a large model, so it is written to be quick."""
    if not name or not name.isprintable():
        raise CheckpointError(f"{path}: tensor name {name[:200]!r} is empty or holds control characters")
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise _wrong(path, name, "must be {dtype, shape, data_offsets}", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _wrong(path, name, "dtype must be one of " + " ".join(BITS), dtype)
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise _wrong(path, name, f"shape must be at most {MAX_RANK} sizes below 2^48", shape)
    if not _naturals(offsets) or len(offsets) != 2:
        raise _wrong(path, name, "data_offsets must be [begin, end]", offsets)
    bits, (begin, end) = prod(shape) * BITS[dtype], offsets
    if bits % 8 or prod(max(d, 1) for d in shape) >= 2**60 or end - begin != bits // 8:
        raise _wrong(
            path, name, f"{dtype} {shape} takes {bits / 8:g} bytes, data_offsets must say so", offsets
        )
    return TensorInfo(path, dtype, tuple(shape), start + begin, start + end)


def _naturals(value) -> bool:
    return type(value) is list and all(type(v) is int and 0 <= v < 2**48 for v in value)


def _wrong(path: Path, name: str, wanted: str, got) -> CheckpointError:
    return CheckpointError(f"{path}: tensor {name[:200]!r}: {wanted}, got {got!r:.200}")


def parse_json(path: Path, text: bytes, what: str) -> dict:
    """A JSON object without doubled keys."""

    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            doubled = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
            raise CheckpointError(f"{path}: {what}: {doubled[:200]!r} stands there twice")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} must be a JSON object, got {type(value).__name__}")
    return value

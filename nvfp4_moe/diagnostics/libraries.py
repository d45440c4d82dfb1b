"""Which GPU architectures a shared library holds machine code for: read off the file, no GPU and no CUDA tool
needed."""

import mmap
import re
import struct
from pathlib import Path

# nvcc embeds "fat binaries": a 16-byte header (magic, version, its own size, bytes that follow), then entries
# of
# (kind u16, - u16, header size u32, bytes u64, .. , architecture u32 at byte 28). Kind 2 is machine code
# (SASS).
# Seen with CUDA 13.0; what does not look like that is skipped.
MAGIC = b"\x50\xed\x55\xba"
HEADER = struct.Struct("<HHQ")
ENTRY = struct.Struct("<HHIQ12xI")
SASS = 2


def architectures(library: Path) -> list[int]:
    """[80, 90, ..]; empty for a library without GPU code."""
    found = set()
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for match in re.finditer(re.escape(MAGIC), data):
            at = match.end()
            if at + HEADER.size > len(data):
                break
            _, header, size = HEADER.unpack_from(data, at)
            at += HEADER.size
            end = min(at + size, len(data))
            while header == 16 and at + ENTRY.size <= end:
                kind, _, skip, nbytes, arch = ENTRY.unpack_from(data, at)
                if kind not in (1, SASS) or not 20 <= arch < 1000 or skip < ENTRY.size:
                    break
                if kind == SASS:
                    found.add(arch)
                at += skip + nbytes
    return sorted(found)

"""Stands before ptxas: lowers PTX that holds tcgen05 or block-scaled mma.sync instructions, then runs the
real one for Hopper."""

import os
import subprocess
import sys
from pathlib import Path

import lower
import lower_sm120

shim, arguments = sys.argv[1], sys.argv[2:]
for i, name in enumerate(arguments):
    ptx = Path(name).read_text() if name.endswith(".ptx") else ""
    if by := lower if "tcgen05" in ptx else lower_sm120 if lower_sm120.NAME in ptx else None:
        text, counts = by.lower(ptx)
        arguments[i] = f"{name}.lowered.ptx"
        Path(arguments[i]).write_text(text)
        print("lowered", counts)
arguments = ["-arch=sm_90a" if name == "-arch=sm_120a" else name for name in arguments]
path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != shim)
sys.exit(subprocess.call(["ptxas", *arguments], env={**os.environ, "PATH": path}))

"""Stands before ptxas: lowers PTX that holds tcgen05 instructions, then runs the real one."""

import os
import subprocess
import sys
from pathlib import Path

from lower import lower

shim, arguments = sys.argv[1], sys.argv[2:]
for i, name in enumerate(arguments):
    if name.endswith(".ptx") and "tcgen05" in Path(name).read_text():
        text, counts = lower(Path(name).read_text())
        arguments[i] = f"{name}.lowered.ptx"
        Path(arguments[i]).write_text(text)
        print("lowered", counts)
path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != shim)
sys.exit(subprocess.call(["ptxas", *arguments], env={**os.environ, "PATH": path}))

"""What a library's kernels are made of, by cuobjdump and nvdisasm; needs no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path


@cache
def tools() -> Path | None:
    """A folder with both: on PATH, of the PyPI packages nvidia-cuda-*, or of triton."""
    folders = [Path(found).parent for found in [shutil.which("cuobjdump")] if found]
    for package, inside in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for site in spec.submodule_search_locations or () if spec else ():
            folders += Path(site).glob(inside)
    both = (f for f in folders if (f / "cuobjdump").is_file() and (f / "nvdisasm").is_file())
    return next(both, None)


@cache
def dump(library: Path, *what: str) -> str:
    env = {**os.environ, "PATH": f"{tools()}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([tools() / "cuobjdump", *what, library], env=env, capture_output=True, text=True)
    assert done.returncode == 0 or "does not contain device code" in done.stderr, done.stderr
    return done.stdout


@cache
def kernels(library: Path) -> dict[tuple[str, str], str]:
    """(architecture, mangled name) -> SASS."""
    found, arch, name = {}, "", ""
    for line in dump(library, "--dump-sass").splitlines():
        if m := re.search(r"arch = (\w+)", line):
            arch, name = m[1], ""
        elif m := re.search(r"Function : (\S+)", line):
            name = m[1]
            found[arch, name] = []
        elif name:
            found[arch, name].append(line)
    return {key: "\n".join(lines) for key, lines in found.items()}

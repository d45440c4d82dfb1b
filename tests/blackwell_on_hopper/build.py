"""Builds the Blackwell libraries for Hopper: `python build.py OUT [shadow | ptx | sm120_shadow | sm120_ptx]`.

shadow: the real operators and set-up kernel, the shadow executor in the kernels' place.
ptx: the real everything; ptxas gets the kernels' own PTX with Blackwell's instructions lowered to calls.
All register as the chip of compute capability 9 and need no GPU to be built."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc/kernels"
COMMON = [KERNELS / "sm100/grouped_gemm.cu", HERE / "chip.cu"]
SOURCES = {
    "shadow": [*COMMON, HERE / "shadow.cu"],
    "ptx": [
        *COMMON,
        HERE / "tensor_map.cu",
        *sorted((KERNELS / "sm100").glob("tile_*.cu")),
    ],
    "sm120_shadow": [KERNELS / "sm120/grouped_gemm.cu", HERE / "chip.cu", HERE / "shadow_sm120.cu"],
    "sm120_ptx": [KERNELS / "sm120/grouped_gemm.cu", HERE / "chip.cu", KERNELS / "sm120/tiles.cu"],
}


def flags(cutlass: Path, arch: str = "90a") -> list[str]:
    return [
        "-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-DNDEBUG", "-w",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-w",
        f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{cutlass}",
    ]  # fmt: skip


def compile_lowered(nvcc: str, source: Path, out: Path, options: list[str]) -> None:
    """What nvcc would run, with another ptxas in front: nvcc itself looks into no inline assembly. Where the
    PTX is for sm_120a, what comes out is for sm_90a all the same."""
    emulation = HERE / ("emulation_sm120.cuh" if source.parent.name == "sm120" else "emulation.cuh")
    extra = ["-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL", "-include", str(emulation)]
    with tempfile.TemporaryDirectory() as folder:
        shim, env = Path(folder), {**os.environ, "TMPDIR": folder}
        ptxas = shim / "ptxas"
        ptxas.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {HERE / "ptxas.py"} {shim} "$@"\n')
        ptxas.chmod(0o755)
        command = [nvcc, "--dryrun", *options, *extra, "-c", str(source), "-o", str(out)]
        plan = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stderr
        steps = [line.removeprefix("#$ ") for line in plan.splitlines() if line.startswith("#$ ")]
        steps = [re.sub(r"^(\w+)=(.*)$", lambda m: f"{m[1]}={shlex.quote(m[2])}", step) for step in steps]
        steps = [re.sub(r"^rm ", "rm -f ", step) for step in steps]
        steps = [step.replace("kind=elf,sm=120a", "kind=elf,sm=90a") for step in steps]
        front = next(i for i, step in enumerate(steps) if step.startswith("PATH="))
        steps.insert(front + 1, f"PATH={shim}:$PATH")
        subprocess.run(["bash", "-e", "-c", "\n".join(steps)], check=True, cwd=folder, env=env)


def build(out: Path, what: str, nvcc: str, cuda: Path, cutlass: Path) -> Path:
    objects = out / what
    objects.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        to = objects / f"{source.stem}.o"
        if source.stem.startswith("tile"):
            compile_lowered(nvcc, source, to, flags(cutlass, "120a" if "sm120" in what else "90a"))
        else:
            subprocess.run([nvcc, *flags(cutlass), "-c", source, "-o", to], check=True)
        return to

    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(compiled, SOURCES[what]))
    library = out / f"libblackwell_{what}.so"
    # the emulation's functions have a host stub in every tile's file, which nobody calls
    cudart = [f"-L{cuda}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link = ["c++", "-shared", "-Wl,--allow-multiple-definition", *files, "-o", library, *cudart]
    subprocess.run(link, check=True)
    return library


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from setup import CUDA_HOME, cutlass_include

    out, *asked = sys.argv[1:]
    for what in (name for name in SOURCES if not asked or name.endswith(tuple(asked))):
        print(build(Path(out).resolve(), what, f"{CUDA_HOME}/bin/nvcc", Path(CUDA_HOME), cutlass_include()))

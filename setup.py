"""One shared library per chip folder, on torch's stable ABI: no Python inside, one for every torch >= 2.11.

NVFP4_CHIPS = sm90,sm100,... | all | none (CPU only, nvcc not used); unset: the chips found on this machine.
NVFP4_SANITIZE = 1: for compute-sanitizer, some tenth slower (docs/kernels.md, Hopper).
The device is asked through nvidia-smi, never through CUDA, so a build needs no GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
TORCH_FLOOR = "0x020b000000000000"  # torch 2.11, the oldest stable ABI this targets
# chip -> the architecture of the kernels that run on every chip, the architectures of its own library. SASS
# of a major version runs on its later minor ones, but not what ends in "a".
CHIPS = {
    "sm80": ("80", []),
    "sm90": ("90", ["90a"]),
    "sm100": ("100", ["100a", "103a"]),
    "sm120": ("120", ["120a", "121a"]),
}
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
]
# --no-as-needed: the weak CUDA stream symbol of libtorch must bind although nothing else here needs it
LINK_FLAGS = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def find_cuda() -> str | None:
    """CUDA_HOME, or the folder above nvcc; where nvcc on PATH is a script that calls another, nvcc knows
    better."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc")
    if not nvcc:
        return None
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True
    ).stderr
    here = next(
        (line.split("=", 1)[1] for line in dryrun.splitlines() if line.startswith("#$ _HERE_=")), None
    )
    return str(Path(here or Path(nvcc).resolve().parent).parent)


NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--fmad=false",
    "--expt-relaxed-constexpr",  # CUTLASS calls host constexpr functions on the device
    "-DNDEBUG",  # or CUTLASS tests every copy's thread, with a breakpoint behind
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-warn-spills",
    *(["-DNVFP4_SANITIZE"] if os.environ.get("NVFP4_SANITIZE") == "1" else []),
]
CUDA_HOME = find_cuda()
cpp_extension.CUDA_HOME = CUDA_HOME  # None under a CPU-only torch, whatever the environment says


def wanted_chips() -> list[str]:
    asked = os.environ.get("NVFP4_CHIPS", "")
    if asked == "none" or not CUDA_HOME:
        return []
    if asked == "all":
        return list(CHIPS)
    if not asked:
        majors = {capability.split(".")[0] for capability in machine_capabilities()}
        return [chip for chip in CHIPS if chip.removeprefix("sm")[:-1] in majors]
    chips = asked.split(",")
    if unknown := sorted(set(chips) - set(CHIPS)):
        sys.exit(f"NVFP4_CHIPS: no such chip {', '.join(unknown)}; there are {', '.join(CHIPS)}, all, none")
    return chips


def machine_capabilities() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split()


def cutlass_include() -> Path | None:
    """The submodule if it is checked out, else the PyPI package nvidia-cutlass: the same headers."""
    submodule = ROOT / "third_party/cutlass/include"
    if submodule.is_dir():
        return submodule
    site = Path(cpp_extension.__file__).parents[2]
    package = site / "cutlass_library/source/include"
    return package if package.is_dir() else None


def sources(*folders: str, suffix: str) -> list[str]:
    return sorted(
        p.relative_to(ROOT).as_posix() for d in folders for p in (ROOT / "csrc" / d).glob(f"*{suffix}")
    )


def library(
    name: str, files: list[str], archs: list[str], links=(), includes=()
) -> cpp_extension.CppExtension:
    return cpp_extension.CppExtension(
        f"nvfp4_moe.{name}",
        files,
        include_dirs=list(includes),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_FLOOR)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS + gencode(archs)},
        extra_link_args=[*LINK_FLAGS, *links],
    )


def core(chips: list[str]) -> cpp_extension.CppExtension:
    """libnvfp4: schemas, the CPU kernels and, for the chips wanted, the CUDA kernels that run on every
    chip."""
    cpp, cuda = sources("ops", "kernels/cpu", suffix=".cpp"), sources("kernels/cuda", suffix=".cu")
    if not (chips and cuda):
        return library("libnvfp4", cpp, [])
    cpp.remove("csrc/ops/no_cuda.cpp")
    return library("libnvfp4", cpp + cuda, [CHIPS[chip][0] for chip in chips], links=cudart())


def chip_libraries(chips: list[str]) -> list[cpp_extension.CppExtension]:
    """One library for each chip that has kernels of its own, csrc/kernels/<chip>; it registers with the
    core."""
    own = {chip: sources(f"kernels/{chip}", suffix=".cu") for chip in chips}
    if (needing := {"sm100", "sm120"} & set(chips)) and not cutlass_include():
        sys.exit(
            f"NVFP4_CHIPS: {', '.join(sorted(needing))} needs CUTLASS's headers: "
            "git submodule update --init, or pip install --no-deps nvidia-cutlass==4.2.0.0"
        )
    return [
        library(f"libnvfp4_{chip}", files, CHIPS[chip][1], links=cudart(), includes=[str(cutlass_include())])
        for chip, files in own.items()
        if files
    ]


def cudart() -> list[str]:
    """Static: the library must load where there is no CUDA."""
    return [f"-L{CUDA_HOME}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def gencode(archs: list[str]) -> list[str]:
    """SASS only: a chip without a kernel of its own gets an error that says so, never a slow surprise."""
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]


def cute_probe(cutlass: Path) -> cpp_extension.CppExtension:
    """CUTLASS's own scale-factor layouts, evaluated on the host: for the tests and `nvfp4 layout`."""
    import pybind11

    return cpp_extension.CppExtension(
        "nvfp4_moe._cute",
        sources("cute", suffix=".cpp"),
        include_dirs=[
            pybind11.get_include(),
            str(cutlass),
            f"{CUDA_HOME}/include",
            f"{CUDA_HOME}/include/cccl",
        ],
        extra_compile_args=["-std=c++20", "-O1", "-w", "-ffp-contract=off"],
    )


def drop_stale_objects() -> None:
    """Ninja knows the headers of what g++ compiled, not of what nvcc did."""
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))
    for folder in (ROOT / "csrc/kernels").iterdir():
        for built in (ROOT / "build").glob(f"temp*/csrc/kernels/{folder.name}/*.o"):
            if built.stat().st_mtime < newest and list(folder.glob(f"{built.stem}.cu")):
                built.unlink()


class PortableWheel(bdist_wheel):
    """py3-none: the libraries hold no Python, so one wheel serves every interpreter."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":  # so that tests can import the above
    drop_stale_objects()
    chips = wanted_chips()
    extensions = [core(chips), *chip_libraries(chips)]
    in_place = any(command in sys.argv for command in ("editable_wheel", "develop", "build_ext"))
    cute = in_place and CUDA_HOME and cutlass_include()
    if cute:
        extensions.append(cute_probe(cute))
    built = ["cpu", *chips] + (["_cute (CUTLASS layouts, for tests)"] if cute else [])
    print(
        f"nvfp4_moe: building {', '.join(built)}"
        + ("" if CUDA_HOME else "; no nvcc found, so no GPU kernels"),
        file=sys.stderr,
    )

    setup(
        ext_modules=extensions,
        cmdclass={
            "build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True),
            "bdist_wheel": PortableWheel,
        },
    )

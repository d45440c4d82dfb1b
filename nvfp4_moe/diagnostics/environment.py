"""What is on this machine, what would run here, and whether it does: one finding a row."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import ops
from .finding import ERROR, INFO, OK, WARNING, Finding
from .libraries import architectures
from .smoke import operators

TORCH_FLOOR = (2, 11)  # the oldest stable ABI the libraries are built for
# rows an expert, what for: one token of decoding, a batch, a prompt; of DeepSeek-V3's size
PLANS = ((8, "decoding, 1 token"), (512, "decoding, 64 tokens"), (65536, "prompt, 8192 tokens"))
N, K, E = 4096, 7168, 256
CHIP_OF = {8: "sm80", 9: "sm90", 10: "sm100", 12: "sm120"}  # compute capability's major -> NVFP4_CHIPS' name


def environment() -> list[Finding]:
    """Every row of `nvfp4 doctor`; severities ok, info (something is absent that need not be there), warning,
    error."""
    return [*_torch(), *_libraries(), *_gpus(), *_plans(), *_smoke()]


def _torch() -> Iterator[Finding]:
    version = torch.__version__
    python = f"Python {platform.python_version()}, {platform.machine()}"
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        yield Finding("torch", ERROR, f"torch {version}, {python}", f"install torch {floor} or later")
    else:
        yield Finding("torch", OK, f"torch {version}, {python}, {torch.get_num_threads()} threads")
    if torch.version.cuda:
        yield Finding("CUDA", OK, f"torch is built with CUDA {torch.version.cuda}")
    elif gpus := nvidia_smi():
        advice = "install a torch built with CUDA: https://pytorch.org/get-started/locally"
        yield Finding("CUDA", WARNING, f"torch has no CUDA, this machine has a GPU ({gpus[0]})", advice)
    else:
        yield Finding("CUDA", INFO, "torch is built without CUDA; everything runs on the CPU")


def nvidia_smi() -> list[str]:
    """The GPUs the driver sees, in words; empty without a driver."""
    command = shutil.which("nvidia-smi")
    if not command:
        return []
    query = [command, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def loaded_libraries() -> list[Path]:
    """The core and the chips' own libraries that this process has loaded."""
    return sorted(Path(path) for path in torch.ops.loaded_libraries if "libnvfp4" in Path(path).name)


def _libraries() -> Iterator[Finding]:
    libraries = loaded_libraries()
    for path in libraries:
        archs = architectures(path)
        names = ", ".join(f"sm_{arch}" for arch in archs) or "no GPU code: the CPU alone"
        yield Finding("library", OK, f"{path.name} is loaded: {names}")
    for folder in {path.parent for path in libraries}:
        for path in sorted(set(folder.glob("libnvfp4_sm*.so")) - set(libraries)):
            advice = (
                "build again, in a clean checkout: it is of another version, or something it needs is missing"
            )
            yield Finding("library", ERROR, f"{path.name} lies beside the core and is not loaded", advice)


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if torch.version.cuda:
            gpus = nvidia_smi()
            severity = WARNING if gpus else INFO
            advice = "torch's CUDA and the driver do not fit: update the driver" if gpus else ""
            yield Finding(
                "GPU", severity, "no CUDA device is usable" + (f" ({gpus[0]})" if gpus else ""), advice
            )
        return
    names = {path.stem: path for path in loaded_libraries()}
    generic = {arch for path in names.values() if path.stem == "libnvfp4" for arch in architectures(path)}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        chip = CHIP_OF.get(device.major)
        memory = device.total_memory / 2**30
        title = f"cuda:{index} {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB: "
        # SASS of a major version runs on its own and on later minor versions
        runs = any(a // 10 == device.major and a % 10 <= device.minor for a in generic)
        if runs and f"libnvfp4_{chip}" in names:
            yield Finding("GPU", OK, title + f"{chip}'s own kernels are there")
        elif runs:
            yield Finding("GPU", OK, title + "kernels for every chip are there, none of its own")
        else:
            advice = (
                f"build with NVFP4_CHIPS={chip}" if chip else "CUDA kernels need sm_80 or later; use the CPU"
            )
            yield Finding("GPU", ERROR, title + "no kernels for it in this build", advice)


def _plans() -> Iterator[Finding]:
    for compute in ("nvfp4", "bf16"):
        for rows, what in PLANS:
            title = f"{compute}, {what} (R {rows}, N {N}, K {K}, E {E}): "
            try:
                yield Finding("plan", OK, title + ops.gemm_plan(rows, N, K, E, compute))
            except RuntimeError as error:
                yield Finding("plan", ERROR, title + str(error).splitlines()[0], "see the GPU's row")


def _smoke() -> Iterator[Finding]:
    """Every operator once, on the CPU and on each GPU."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for device in ("cpu", *(f"cuda:{index}" for index in gpus)):
        for name, run in operators(device):
            advice = "numbers from this machine are wrong: please report it with `nvfp4 doctor --json`"
            try:
                wrong = run()
            except Exception as error:  # whatever happens is what this row is for
                wrong = f"{type(error).__name__}: {error}".splitlines()[0]
                advice = "it does not run here; the rows above may say why"
            title = f"{name} on {device}: " + (wrong or "the reference's result")
            yield Finding("operator", ERROR if wrong else OK, title, advice if wrong else "")

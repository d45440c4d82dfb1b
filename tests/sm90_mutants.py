"""Do Hopper's tests see mistakes in its kernels? One planted at a time, in a copy of the source.

python tests/sm90_mutants.py build FOLDER   # with nvcc: a library a mistake
python tests/sm90_mutants.py run FOLDER     # on a Hopper: each instead of the installed one
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc/kernels"
TESTS = ["tests/test_sm90.py", "tests/test_sm90_packed.py", "tests/test_sm90_moe.py"]
REACH = {  # by what is compiled: the tests that run it, as pytest's -k
    "gemm_8": "1x24x1536 or 3x96x1536 or replayed",
    "gemm_16": "9x4x392 or 9x4x448 or 9x24x1536 or replayed",
    "gemm_128": "112x4x392 or 112x4x448 or 100x24x1536 or replayed",
    "pair_8": "1568",
    "pair_8s": "uneven",
    "prepare": "9x4x392 or 9x4x448 or captured or 1568",
}
SIDE_BY_SIDE = 6
SECONDS = 60
TAKES = "last < each ? take()"
ANNOUNCED = "hear(&kernel.shared.left[lane]) < parts"
PLACE_OF_TURN = "turned[(4 * lane + i) ^ lane / 2 % 4]"


@dataclass
class Mutant:
    name: str
    file: str  # of csrc/kernels/sm90
    right: str  # stands there once
    wrong: str
    source: str = "gemm_16"  # which is compiled with it; the others stay right

    @property
    def so(self) -> str:
        return f"{self.name.replace(' ', '_')}.so"

    def apply(self, folder: Path) -> None:
        path = folder / "sm90" / self.file
        text = path.read_text()
        assert text.count(self.right) == 1, f"{self.name}: {self.right} stands {text.count(self.right)} times"
        path.write_text(text.replace(self.right, self.wrong))


MUTANTS = [
    Mutant("carried sums dropped", "kernel.cuh", "if (own.begin > 0) carried", "if (own.begin < 0) carried"),
    Mutant("own sums carried", "carry.cuh", "from = values(before)", "from = values(blockIdx.x)"),
    Mutant("carried NaN forgotten", "carry.cuh", "worst[u] = __ldcg(from)", "worst[u] = 0"),
    Mutant("flag stays up", "carry.cuh", "*flag(before) = 0", "(void)0", "gemm_128"),
    Mutant("rest a stage early", "work.cuh", "s.rest * kStageSteps", "(s.rest - 1) * kStageSteps"),
    Mutant("announced before they are left", "carry.cuh", ANNOUNCED, "false", "gemm_8"),
    Mutant("tokens announced before", "carry.cuh", ANNOUNCED, "false", "pair_8"),
    Mutant("tokens not awaited", "gemm.cuh", "< problem.awaits)", "< 0)", "pair_8"),
    Mutant("all but a row tile awaited", "gemm.cuh", "< problem.awaits)", "< problem.awaits - 1)", "pair_8"),
    Mutant("another tile awaited", "gemm.cuh", "problem.finished + tile)", "problem.finished)", "pair_8"),
    Mutant("counts kept", "prepare.cu", "counts.first[i] = 0", "(void)0", "prepare"),
    Mutant(
        "one share for all", "pair.cuh", "atomicAdd(taken, 1)", "atomicAdd(taken, 0) + blockIdx.x", "pair_8"
    ),
    Mutant("one share a CTA", "pair.cuh", TAKES, "last < 0 ? take()", "pair_8"),
    Mutant("a share kept for each CTA", "pair.cuh", TAKES, "last < each ? each + blockIdx.x", "pair_8"),
    Mutant(
        "a pair's sums dropped",
        "narrow.cuh",
        "if (own.begin > 0) carried",
        "if (own.begin < 0) carried",
        "pair_8s",
    ),
    Mutant(
        "choices from the second on",
        "work.cuh",
        "int64_t e = expert_of(threadIdx.x)",
        "int64_t e = -1",
        "pair_8",
    ),
    Mutant(
        "quantized lanes exchanged",
        "prepare.cu",
        "uint4{far.x, far.y, near.x, near.y}",
        "uint4{near.x, near.y, far.x, far.y}",
        "prepare",
    ),
    Mutant("tokens of another step", "narrow.cuh", "(tokens ^ 64)", "(tokens ^ 32)", "gemm_8"),
    Mutant("pairs of another lane", "narrow.cuh", "k_order ? 1 : 2", "k_order ? 2 : 1", "gemm_8"),
    Mutant("stage full of weights alone", "kernel.cuh", "T::kNarrow ? 2 : 1", "1", "gemm_8"),
    Mutant("scales of the other step", "weights.cuh", "s ? 0xd591 : 0xc480", "s ? 0xc480 : 0xd591"),
    Mutant("low rows for high", "weights.cuh", "kHigh = kStrips * kStripBytes", "kHigh = 0"),
    Mutant("order not turned", "prepare.cu", PLACE_OF_TURN, "turned[4 * lane + i]", "prepare"),
    Mutant("codes doubled", "prepare.cu", "0x43004300", "0x43804380", "prepare"),
    Mutant(
        "leads at once",
        "prepare.cu",
        "  follow();\n  if (!p.ids) lead();",
        "  if (!p.ids) lead();\n  follow();",
        "prepare",
    ),
    Mutant("free for one", "kernel.cuh", "kernel.team() * T::kConsumers", "T::kConsumers", "gemm_128"),
    Mutant("halves exchanged", "gemm.cuh", "row + rank() *", "row + (1 - rank()) *", "gemm_128"),
    Mutant("sums of the other CTA", "carry.cuh", "cta - kernel.team()", "cta - 1", "gemm_128"),
    Mutant("one row tile twice", "work.cuh", "* team() + rank()", "* team()", "gemm_128"),
    Mutant("products too narrow", "kernel.cuh", "if (it.count > N)", "if (it.count > N + 8)", "gemm_128"),
]


def build(out: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import setup

    sources = sorted(p.stem for p in (KERNELS / "sm90").glob("*.cu"))
    flags = [*setup.NVCC_FLAGS, *setup.gencode(["90a"]), f"-I{setup.cutlass_include()}"]
    flags = [flag for flag in flags if flag != "-Xptxas=-warn-spills"]
    objects = out / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def compiled(kernels: Path, source: str, to: Path) -> None:
        command = [f"{setup.CUDA_HOME}/bin/nvcc", *flags, "-c", kernels / f"sm90/{source}.cu"]
        subprocess.run([*command, "-o", to / f"{source}.o"], check=True)

    def library(mutant: Mutant) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(KERNELS, Path(folder) / "kernels")
            mutant.apply(copy)
            compiled(copy, mutant.source, Path(folder))
            files = [(Path(folder) if s == mutant.source else objects) / f"{s}.o" for s in sources]
            command = ["c++", "-shared", *files, "-o", out / mutant.so]
            subprocess.run([*command, *setup.cudart()], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: compiled(KERNELS, source, objects), sources))
        list(pool.map(library, MUTANTS))
    shutil.rmtree(objects)


def verdict(library: Path, tests: str) -> tuple[str, float, str]:
    """green, red or hangs; seconds; the first test that failed."""
    import nvfp4_moe

    with tempfile.TemporaryDirectory() as folder:
        core = Path(shutil.copy(Path(nvfp4_moe.__file__).parent / "libnvfp4.so", folder))
        shutil.copy(library, core.with_name("libnvfp4_sm90.so"))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rfE", "-k", tests]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, "--import-mode=append", *TESTS],
                env={**os.environ, "NVFP4_LIBRARY": str(core), "OMP_NUM_THREADS": "2"},
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return "hangs", SECONDS, ""
    seconds = time.perf_counter() - start
    if done.returncode == 0:
        return "green", seconds, ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "red", seconds, failed[0] if failed else (done.stdout + done.stderr)[-200:]  # or pytest crashed


def run(folder: Path) -> bool:
    import nvfp4_moe

    right = Path(nvfp4_moe.__file__).parent / "libnvfp4_sm90.so"

    def trial(name: str, library: Path, tests: str) -> tuple[str, float]:
        color, seconds, first = verdict(library, tests)
        print(f"{color:5} {seconds:4.0f} s  {name}  {first}", flush=True)
        return color, seconds

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        controls = list(pool.map(lambda tests: trial("nothing planted", right, tests), REACH.values()))
        colors = list(pool.map(lambda m: trial(m.name, folder / m.so, REACH[m.source])[0], MUTANTS))
    # what is only slow would count as hanging
    answers = all(color == "green" and 2 * seconds < SECONDS for color, seconds in controls)
    return answers and "green" not in colors


if __name__ == "__main__":
    what, where = sys.argv[1:]
    if what == "build":
        build(Path(where))
    else:
        sys.exit(not run(Path(where)))

"""Do Hopper's tests see mistakes in its kernels? One planted at a time, in a copy of the source.

python tests/sm90_mutants.py build FOLDER   # with nvcc: a library a mistake
python tests/sm90_mutants.py run FOLDER     # on a Hopper: each instead of the installed one, red or green
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc/kernels"
TESTS = [f"tests/test_sm90{part}.py" for part in ("", "_packed", "_moe")]
SIDE_BY_SIDE = 6
SECONDS = 200  # what hangs is red
PLACE_OF_TURN = "turned[(4 * lane + i) ^ lane / 2 % 4]"


@dataclass
class Mutant:
    name: str
    file: str  # of csrc/kernels/sm90
    right: str  # stands there once
    wrong: str
    source: str = "gemm_16"  # which is compiled with it; the others stay right

    def apply(self, folder: Path) -> None:
        path = folder / "sm90" / self.file
        text = path.read_text()
        assert text.count(self.right) == 1, f"{self.name}: {self.right} stands {text.count(self.right)} times"
        path.write_text(text.replace(self.right, self.wrong))


MUTANTS = [
    Mutant(
        "carried sums dropped", "epilogue.cuh", "if (own.begin > 0) carried", "if (own.begin < 0) carried"
    ),
    Mutant("own sums carried", "epilogue.cuh", "from = values(before)", "from = values(blockIdx.x)"),
    Mutant("carried NaN forgotten", "epilogue.cuh", "worst[u] = __ldcg(from)", "worst[u] = 0"),
    Mutant("flag stays up", "epilogue.cuh", "*flag(before) = 0", "(void)0"),
    Mutant(
        "rest a stage early", "gemm.cuh", "{begin, rest * kStageSteps,", "{begin, (rest - 1) * kStageSteps,"
    ),
    Mutant(
        "tokens unawaited", "epilogue.cuh", "    follow();\n    kernel.load_tokens", "    kernel.load_tokens"
    ),
    Mutant("scales of the other step", "weights.cuh", "s ? 0xd591 : 0xc480", "s ? 0xc480 : 0xd591"),
    Mutant("low rows for high", "weights.cuh", "kHigh = kStrips * kStripBytes", "kHigh = 0"),
    Mutant("order not turned", "prepare.cu", PLACE_OF_TURN, "turned[4 * lane + i]", "prepare"),
    Mutant("codes doubled", "prepare.cu", "0x43004300", "0x43804380", "prepare"),
    Mutant("leads at once", "prepare.cu", "  follow();\n  lead();", "  lead();\n  follow();", "prepare"),
    Mutant("free for one", "epilogue.cuh", "kernel.team() * T::kConsumers", "T::kConsumers", "gemm_128"),
    Mutant("halves exchanged", "gemm.cuh", "row + rank() *", "row + (1 - rank()) *", "gemm_128"),
    Mutant("sums of the other CTA", "epilogue.cuh", "blockIdx.x - team", "blockIdx.x - 1", "gemm_128"),
    Mutant("one row tile twice", "gemm.cuh", "* team() + rank()", "* team()", "gemm_128"),
    Mutant("products too narrow", "epilogue.cuh", "if (it.count > N)", "if (it.count > N + 8)", "gemm_128"),
]


def build(out: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import setup

    sources = sorted(p.stem for p in (KERNELS / "sm90").glob("*.cu"))
    flags = [*setup.NVCC_FLAGS, *setup.gencode(["90a"]), f"-I{setup.cutlass_include()}"]
    flags = [flag for flag in flags if flag != "-Xptxas=-warn-spills"]
    objects = out / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path, to: Path) -> Path:
        subprocess.run([f"{setup.CUDA_HOME}/bin/nvcc", *flags, "-c", source, "-o", to], check=True)
        return to

    def library(mutant: Mutant) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(KERNELS, Path(folder) / "kernels")
            mutant.apply(copy)
            mine = compiled(copy / "sm90" / f"{mutant.source}.cu", Path(folder) / "mine.o")
            files = [mine if s == mutant.source else right[s] for s in sources]
            to = out / f"{mutant.name.replace(' ', '_')}.so"
            subprocess.run(["c++", "-shared", *files, "-o", to, *setup.cudart()], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        right = dict(
            zip(
                sources,
                pool.map(lambda s: compiled(KERNELS / "sm90" / f"{s}.cu", objects / f"{s}.o"), sources),
                strict=True,
            )
        )
        list(pool.map(library, MUTANTS))
    shutil.rmtree(objects)


def verdict(library: Path) -> tuple[bool, str]:
    """Whether a test failed, and the first that did."""
    import nvfp4_moe

    with tempfile.TemporaryDirectory() as folder:
        core = Path(shutil.copy(Path(nvfp4_moe.__file__).parent / "libnvfp4.so", folder))
        shutil.copy(library, core.with_name("libnvfp4_sm90.so"))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rfE", *TESTS]
        try:
            done = subprocess.run(
                [*command, "--import-mode=append"],
                env={**os.environ, "NVFP4_LIBRARY": str(core)},
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return True, f"nothing after {SECONDS} s"
    lines = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return done.returncode != 0, (lines or done.stdout.splitlines()[-1:] or [done.stderr[-200:]])[0]


def run(folder: Path) -> bool:
    libraries = sorted(folder.glob("*.so"))
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = list(pool.map(verdict, libraries))
    for library, (red, first) in zip(libraries, found, strict=True):
        print("red  " if red else "GREEN", library.stem.replace("_", " "), "|", first)
    return all(red for red, _ in found)


if __name__ == "__main__":
    what, where = sys.argv[1:]
    if what == "build":
        build(Path(where))
    else:
        sys.exit(not run(Path(where)))

"""Wrong kernels of sm_120, to see that the tests on a Hopper notice: `python mutants_sm120.py build OUT`
needs no GPU, `run OUT` the Hopper, and NVFP4_LIBRARY set as for the tests."""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNEL = "csrc/kernels/sm120/gemm.cuh"

MUTANTS = {  # name: what stands in the kernel, what instead
    "scales_swapped": ("sf_a[i], sf_b)", "sf_b, sf_a[i])"),
    "halves_of_k_swapped": ("b[2 * h], b[2 * h + 1]", "b[2 * h + 1], b[2 * h]"),
    "scales_of_another_lane": ("quad + lane() % 2 * 8", "quad + lane() / 2 % 2 * 8"),
    "scales_of_another_k": ("stage.tokens_sf + s * SfLayout", "stage.tokens_sf + (s ^ 1) * SfLayout"),
    "scales_of_the_first_tokens": ("walk.token % SfLayout::kAtomRows", "0"),
    "scales_of_the_first_atom": ("(second ? walk.token : walk.row) / Sf", "(second ? walk.token : 0) / Sf"),
    "scales_of_the_first_expert": ("groups.tokens_sf[e]", "groups.tokens_sf[0]"),
    "size_for_cosize": ("* SfLayout{1, K / kBlock}.cosize()", "* (K / kBlock * 128)"),
    "padding_multiplied": ("columns - 4 * s == 2 ? 0xffff : ~0u", "~0u"),
    "no_swizzle": ("(chunk() ^ row() % 8)", "chunk()"),
    "neighbours_alpha": ("epilogue.alpha_of(e, column", "epilogue.alpha_of(e ? e - 1 : 0, column"),
    "neighbours_token": ("room + place(mine, piece)", "room + place(mine ^ 1, piece)"),
    "group_offset": ("epilogue.scale_of(begin + min", "epilogue.scale_of(min"),
    "weights_eight_rows_off": ("(walk.row + row()) * static", "(max(walk.row - 8, 0) + row()) * static"),
    "tiles_miscounted": ("before += __shfl_sync(~0u, through, 31);", ""),
    "sums_not_cleared": ("Part<T> part{};", "Part<T> part{1.0f};"),
}


def build(out: Path, name: str) -> None:
    """A copy of the sources with the mutation, and its library."""
    old, new = MUTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("csrc/kernels", "tests/blackwell_on_hopper"):
            shutil.copytree(ROOT / part, root / part)
        shutil.copy(ROOT / "setup.py", root)
        source = (root / KERNEL).read_text()
        assert source.count(old) == 1, f"{name}: found {source.count(old)} times"
        (root / KERNEL).write_text(source.replace(old, new))
        command = [sys.executable, root / "tests/blackwell_on_hopper/build.py", root / "out", "sm120_ptx"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copy(root / "out/libblackwell_sm120_ptx.so", out / f"libblackwell_sm120_{name}.so")


def caught(out: Path, name: str) -> bool:
    library = out / f"libblackwell_sm120_{name}.so"
    options = ["--tb=no", "-rN", "-p", "no:cacheprovider", "--import-mode=append", "-k", "not 4104"]  # slow
    command = [sys.executable, "-m", "pytest", HERE / "test_on_hopper.py", *options]
    env = {**os.environ, "BLACKWELL_LIBRARY": str(library)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    print(f"{name}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return done.returncode == 1  # some tests failed; anything else is no proof


if __name__ == "__main__":
    what, out = sys.argv[1], Path(sys.argv[2]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2 if what == "build" else 8) as pool:
        done = list(pool.map(lambda name: (build if what == "build" else caught)(out, name), MUTANTS))
    sys.exit(what == "run" and not all(done))

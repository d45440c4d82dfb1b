"""pytest's GPU tests under compute-sanitizer, side by side on all GPUs: a process has a share of a file's.

python tests/sanitize_tests.py [--tools memcheck ..] [--files test_cuda ..] [--jobs N] [--seconds N]

For a wheel built with NVFP4_SANITIZE=1. A process that still runs after --seconds is cut off, and said to be,
as is one that pytest does not see through to its end.
Left out (LEFT_OUT) are tests that the tool itself breaks: it runs kernels one after the other, no graph is
captured without torch's caching allocator, and the profiler has nothing to see.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
KERNELS = ("--kernel-name", "kns=nvfp4")  # torch's own are not looked at
TOOLS = {
    "memcheck": KERNELS,
    "racecheck": KERNELS,
    "synccheck": KERNELS,
    "initcheck": (),
}  # who wrote it, too
IN_A_KERNEL = ("racecheck", "synccheck")  # what lies where in memory is nothing to them
REST = "the rest"
SHARES = {  # processes for a file, the longest first
    "test_sm90": 6, "test_sm90_moe": 6, "test_sm90_packed": 3, "test_cuda": 4, "test_cuda_drawn": 2,
    "test_cuda_extremes": 2, "test_mxfp4": 2, "test_moe": 2, REST: 2,
}  # fmt: skip
FILES = {file: [file] for file in SHARES} | {
    REST: ["test_ops", "test_quantize", "test_remap_sf", "test_pack", "test_gemm", "test_formats",
           "test_packed_layers", "test_seed_regressions", "test_cuda_checkpoint"]
}  # fmt: skip
PASSED, FAILED, NONE_SELECTED = 0, 1, 5  # what pytest returns; else it did not get to its end
LEFT_OUT = ("captur", "graph", "replay", "compile", "inductor", "chips", "synchron", "does_not_wait",
            "small_kernels_wait", "several_streams", "crowded", "memory", "is_a_kernel_of",
            "kernels_are_launched")  # fmt: skip
LEFT_OUT_OF = {"racecheck": ("ten_thousand_bad_calls",)}  # too many of them for it


@dataclass
class Verdict:
    tool: str
    what: str  # file and share
    ended: bool
    passed: int
    failed: list[str]
    errors: int | None  # the tool's; None: it did not get to say
    first: str
    seconds: float

    @property
    def clean(self) -> bool:
        return self.ended and not self.failed and self.errors == 0

    def __str__(self) -> str:
        end = f", {'ended' if self.ended else 'not ended'} after {self.seconds:.0f} s"
        found = "no summary" if self.errors is None else f"{self.errors} errors"
        return (
            f"{self.tool} {self.what}: {self.passed} passed, {len(self.failed)} failed{end}; {found}"
            + "".join(f"\n    {line}" for line in (*self.failed[:3], self.first) if line)
        )


def run(tool: str, file: str, share: int, gpu: int, seconds: int) -> Verdict:
    shares = SHARES[file]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = ["compute-sanitizer", "--tool", tool, *TOOLS[tool], "--log-file", str(log), sys.executable]
        command += ["-m", "pytest", *(str(FOLDER / f"{name}.py") for name in FILES[file]), "-m", "gpu", "-vv"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--import-mode=append"]
        command += ["-k", f"not ({' or '.join(LEFT_OUT + LEFT_OUT_OF.get(tool, ()))})"]
        environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": str(gpu)}
        environment["NVFP4_SHARE"] = f"{share}/{shares}"
        if tool not in IN_A_KERNEL:  # torch's blocks would hide what lies between tensors
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        start = time.perf_counter()
        with open(Path(folder) / "out", "w+") as out:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=out,
                stderr=out,
                cwd=FOLDER.parent,
                start_new_session=True,
            )
            try:
                ended = process.wait(seconds) in (PASSED, FAILED, NONE_SELECTED)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with pytest, which the tool runs
                process.wait()
                ended = False
            out.seek(0)
            lines = out.read().splitlines()
        said = log.read_text().splitlines() if log.exists() else []
    passed = sum(" PASSED" in line for line in lines)
    failed = [line for line in lines if re.search(r"::.* (FAILED|ERROR)", line)]
    counts = [int(n) for line in said for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", line)]
    errors = [line for line in said if line.startswith("=========") and "SUMMARY" not in line]
    first = next((line for line in errors if "COMPUTE-SANITIZER" not in line), "")
    what = f"{file} {share + 1}/{shares}"
    summary = sum(counts) if counts else None
    return Verdict(tool, what, ended, passed, failed, summary, first, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--files", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() // 2)
    parser.add_argument("--seconds", type=int, default=3600, help="for a process")
    args = parser.parse_args()
    work = [
        (tool, file, share) for tool in args.tools for file in args.files for share in range(SHARES[file])
    ]
    gpus = max(torch.cuda.device_count(), 1)
    with ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(run, *w, i % gpus, args.seconds) for i, w in enumerate(work)]
        for done in as_completed(running):
            print(done.result(), flush=True)
    verdicts = [done.result() for done in running]
    for tool in args.tools:
        mine = [v for v in verdicts if v.tool == tool]
        print(
            f"{tool}: {sum(v.passed for v in mine)} tests passed, {sum(len(v.failed) for v in mine)} failed, "
            f"{sum(v.errors or 0 for v in mine)} errors, {sum(not v.ended for v in mine)} processes not ended"
        )
    sys.exit(not all(v.clean for v in verdicts))


if __name__ == "__main__":
    main()

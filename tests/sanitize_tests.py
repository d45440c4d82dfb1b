"""pytest's GPU tests under compute-sanitizer, side by side on all GPUs: a process has a share of a file's, or
of several files'.

python tests/sanitize_tests.py [--tools memcheck ..] [--files test_cuda ..] [--jobs N] [--seconds N]

For a wheel built with NVFP4_SANITIZE=1. A process that still runs after --seconds is cut off, and said to be,
as is one that pytest does not see through to its end or in which no test passes.
Left out are tests that a tool itself breaks. LEFT_OUT: it runs kernels one after the other, takes minutes
with torch's compiler, and leaves the profiler nothing to see. LEFT_OUT_OF: without torch's allocator no graph
is captured, and racecheck hangs where threads launch kernels side by side.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
KERNELS = ("--kernel-name", "kns=nvfp4")  # not torch's
TOOLS = {  # the longest first; initcheck must see torch's write, too
    "racecheck": (*KERNELS, "--racecheck-num-workers", "2"),  # or every process wants all cores
    "memcheck": KERNELS,
    "synccheck": KERNELS,
    "initcheck": (),
}
IN_A_KERNEL = ("racecheck", "synccheck")  # what lies where in memory is nothing to them
REST = "the rest"
SHARES = {  # processes for a file, the longest first
    "test_sm90": 6, "test_sm90_moe": 6, "test_sm90_packed": 6, "test_cuda": 4,
    "test_cuda_extremes": 2, "test_mxfp4": 2, "test_moe": 2, REST: 2,
}  # fmt: skip
TIMES = {"racecheck": 2}  # as many processes, where a test takes several times as long
FILES = {file: [file] for file in SHARES} | {
    REST: ["test_ops", "test_quantize", "test_remap_sf", "test_pack", "test_gemm", "test_formats",
           "test_mxfp4_study", "test_packed_layers", "test_seed_regressions", "test_cuda_checkpoint",
           "test_cuda_drawn"]
}  # fmt: skip
PASSED, FAILED, CUT_OFF = 0, 1, 124  # what pytest, and what timeout return
LEFT_OUT = ("compile", "inductor", "chips", "synchron", "does_not_wait", "small_kernels_wait",
            "several_streams", "crowded", "memory", "is_a_kernel_of", "kernels_are_launched")  # fmt: skip
UNCACHED = ("captur", "graph", "replay")  # and these without torch's allocator
THREADED = ("writes_the_cpus_files", "commands_run_there")  # the second by analogy: none has got so far
LEFT_OUT_OF = {
    "racecheck": ("ten_thousand_bad_calls", *THREADED), "memcheck": UNCACHED, "initcheck": UNCACHED
}  # fmt: skip


@dataclass
class Verdict:
    tool: str
    what: str  # file and share
    status: int
    passed: int
    failed: list[str]
    errors: int | None  # the tool's; None: it did not get to say
    first: list[str]  # of what it said
    end: list[str]  # of what pytest said
    seconds: float

    @property
    def ended(self) -> bool:
        return self.passed > 0 and self.status == (FAILED if self.failed else PASSED)

    @property
    def clean(self) -> bool:
        return self.ended and not self.failed and self.errors == 0

    def __str__(self) -> str:
        end = "ended" if self.ended else "cut off" if self.status == CUT_OFF else f"status {self.status}"
        found = "no summary" if self.errors is None else f"{self.errors} errors"
        why = [] if self.ended else self.end
        return (
            f"{self.tool} {self.what}: {self.passed} passed, {len(self.failed)} failed, {end} after "
            f"{self.seconds:.0f} s; {found}"
            + "".join(f"\n    {line}" for line in (*self.failed[:3], *self.first, *why))
        )


def shares_of(tool: str, file: str) -> int:
    return SHARES[file] * TIMES.get(tool, 1)


def run(tool: str, file: str, share: int, gpus: str, seconds: int) -> Verdict:
    shares, left_out = shares_of(tool, file), LEFT_OUT + LEFT_OUT_OF.get(tool, ())
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = ["timeout", "-k", "5", str(seconds)]
        command += ["compute-sanitizer", "--tool", tool, *TOOLS[tool], "--log-file", str(log), sys.executable]
        command += ["-m", "pytest", *(str(FOLDER / f"{name}.py") for name in FILES[file]), "-m", "gpu", "-vv"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--import-mode=append"]
        command += ["-k", f"not ({' or '.join(left_out)})"]
        environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus}
        environment["NVFP4_SHARE"] = f"{share}/{shares}"
        if tool not in IN_A_KERNEL:  # torch's blocks would hide what lies between tensors
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        start, out = time.perf_counter(), Path(folder) / "out"
        with open(out, "w") as to:
            env = {**os.environ, **environment}
            status = subprocess.run(command, env=env, stdout=to, stderr=to, cwd=FOLDER.parent).returncode
        lines = out.read_text().splitlines()
        said = log.read_text().splitlines() if log.exists() else []
    took = time.perf_counter() - start
    passed = sum(" PASSED" in line for line in lines)
    failed = [line for line in lines if re.search(r"::.* (FAILED|ERROR)", line)]
    counts = [int(n) for line in said for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", line)]
    found = [s for s in said if s.startswith("========= ") and not re.search("SUMMARY|SANITIZER", s)]
    errors, end = sum(counts) if counts else None, lines[-1:]
    return Verdict(tool, f"{file} {share + 1}/{shares}", status, passed, failed, errors, found[:1], end, took)


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
        (tool, file, share)
        for tool in args.tools
        for file in args.files
        for share in range(shares_of(tool, file))
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = deque(visible.split(","))
    with ThreadPoolExecutor(args.jobs) as pool:
        running = []
        for w in work:  # each sees all GPUs, another one first
            running.append(pool.submit(run, *w, ",".join(gpus), args.seconds))
            gpus.rotate(1)
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

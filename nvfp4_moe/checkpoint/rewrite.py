"""A checkpoint written anew, job by job: what convert and quantize share.

A job reads some tensors and makes others. Jobs run in the order of the plan, one at a time, and let go of their
pages at once, so memory holds one job (an expert, mostly) whatever the model's size. Its report is a line in a file
beside the shards: a second run after a crash has the lines of the shards that were finished.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from torch import Tensor

from .header import BITS, CheckpointError
from .layouts import Planned
from .shards import INDEX, Shards
from .writer import SHARD_BYTES, ShardWriter

REPORT = "nvfp4-conversion.json"
LINES = "nvfp4-conversion.jsonl"  # while unfinished
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".pkl")
RELEASE_BYTES = 256 << 20  # mapped source pages that may count as ours


@dataclass(frozen=True)
class Made:
    """What a job gives: tensors by name, and a report line for each module."""

    tensors: dict[str, Tensor]
    reports: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    reads: tuple[str, ...]  # source tensors it replaces or copies
    plan: tuple[Planned, ...]
    run: Callable[[], Made]
    nbytes: int  # of the source, for progress
    modules: tuple[str, ...] = ()  # that it reports on


@dataclass
class Result:
    path: Path
    reports: dict[str, dict]  # by module
    shards: int
    bytes_read: int
    bytes_written: int
    skipped: int  # jobs that an earlier run had finished


def copy_job(shards: Shards, name: str) -> Job:
    info = shards.tensors[name]
    return Job((name,), ((name, info.dtype, info.shape),), lambda: Made({name: shards[name]}), info.nbytes)


def in_file_order(shards: Shards, jobs: Iterable[Job]) -> list[Job]:
    """Jobs, and copies of what they leave, each where its first tensor lies."""
    starting: dict[str, list[Job]] = {}
    replaced = set()
    for job in jobs:
        starting.setdefault(min(job.reads, key=shards.place), []).append(job)
        replaced.update(job.reads)
    ordered = []
    for name in sorted(shards.tensors, key=shards.place):
        ordered += starting.get(name, [] if name in replaced else [copy_job(shards, name)])
    return ordered


def side_files(shards: Shards) -> dict[str, Path]:
    """What else a checkpoint's folder holds at its top, without weights and what is written anew."""
    anew = {INDEX, "config.json", "hf_quant_config.json", REPORT}
    found = {}
    for path in sorted(shards.path.iterdir()):
        hidden = path.name.startswith(".") or path.name.endswith((".index.json", ".partial"))
        if path.is_file() and not hidden and path.name not in anew and path.suffix not in WEIGHT_FILES:
            found[path.name] = shards.inside(path)
    return found


def planned_bytes(jobs: Iterable[Job]) -> int:
    return sum(prod(shape) * BITS[dtype] // 8 for job in jobs for _, dtype, shape in job.plan)


def fingerprint(shards: Shards, options: dict) -> str:
    """Of the source's files and the options: a resumed run must be the same run."""
    files = [(f.name, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in shards.files]
    return hashlib.sha256(json.dumps([files, options], sort_keys=True).encode()).hexdigest()


def rewrite(
    shards: Shards, jobs: list[Job], target, files: dict[str, bytes], options: dict,
    max_shard_bytes: int = SHARD_BYTES, progress: Callable[[int], None] = lambda nbytes: None,
) -> Result:  # fmt: skip
    """Run the jobs that an earlier run has not finished, and write what they make."""
    target = Path(target)
    if target.resolve() == shards.path.resolve():
        raise CheckpointError(f"{target}: source and target are the same directory")
    plan = [entry for job in jobs for entry in job.plan]
    everything = {**side_files(shards), **files}
    writer = ShardWriter(target, plan, everything, max_shard_bytes, fingerprint(shards, options))
    missing, reports = set(writer.missing()), _read_lines(target / LINES)
    skipped, mapped = 0, 0
    with open(target / LINES, "a", encoding="utf-8") as lines:
        for job in jobs:
            wanted = [name for name, _, _ in job.plan if name in missing]
            if wanted or any(m not in reports for m in job.modules):
                made = job.run()
                for report in made.reports:
                    reports[report["module"]] = report
                    lines.write(json.dumps(report) + "\n")
                lines.flush()
                for name in wanted:
                    writer.add(name, made.tensors[name])
                del made
            skipped += not wanted
            mapped += job.nbytes
            if mapped > RELEASE_BYTES:
                shards.release()
                mapped = 0
            progress(job.nbytes)
    summary = {"options": options, **summarize(reports.values())}
    writer.files[REPORT] = json.dumps(summary, indent=2).encode() + b"\n"
    (target / LINES).unlink()
    writer.close()
    reads = sum(job.nbytes for job in jobs)
    return Result(
        target, reports, len(list(target.glob("*.safetensors"))), reads, planned_bytes(jobs), skipped
    )


def summarize(reports: Iterable[dict]) -> dict:
    """Totals, and every module that changed."""
    reports = list(reports)
    lossy = sorted((r for r in reports if not r["exact"]), key=lambda r: -r["relative_rms"])
    return {"modules": len(reports), "exact": len(reports) - len(lossy), "changed": lossy}


def _read_lines(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    reports = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            report = json.loads(line)
        except ValueError:
            continue  # the line a crash cut off; its job runs again
        reports[report["module"]] = report
    return reports

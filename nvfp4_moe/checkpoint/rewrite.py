"""A checkpoint written anew, job by job: what convert and quantize share.

A job reads some tensors and makes others: an expert's gate and up, mostly, so memory holds a few experts
whatever the model's size. Its report is a line in a file beside the shards, where a second run after a crash
finds those of the shards that were finished.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..formats import TENSOR_MAX
from .ahead import run_ahead
from .header import BITS, CheckpointError
from .layouts import Planned
from .shards import INDEX, Shards
from .writer import SHARD_BYTES, ShardWriter

REPORT = "nvfp4-conversion.json"
LINES = "nvfp4-conversion.jsonl"  # while unfinished
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".pkl")
WORST = 100  # modules that the report names
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


@dataclass(frozen=True)
class Result:
    path: Path
    reports: dict[str, dict]  # by module
    shards: int
    skipped: int  # jobs that an earlier run had finished


@dataclass(frozen=True)
class Plan:
    """What would be done: --dry-run prints it, run() does it."""

    shards: Shards
    target: str  # name of the layout
    jobs: list[Job]
    files: dict[str, bytes]
    options: dict
    notes: tuple[str, ...] = ()  # what the user should know before

    @property
    def source_bytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    @property
    def target_bytes(self) -> int:
        return sum(prod(shape) * BITS[dtype] // 8 for job in self.jobs for _, dtype, shape in job.plan)

    @property
    def modules(self) -> list[str]:
        return [m for job in self.jobs for m in job.modules]

    def run(self, target, progress: Callable[[int], None] = lambda nbytes: None, **limits) -> Result:
        return rewrite(self, Path(target), progress, **limits)


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


def left_behind(shards: Shards) -> tuple[str, ...]:
    """A note about folders in the source, which are not copied: DeepSeek-V4's encoding and inference, say."""
    folders = sorted(p.name for p in shards.path.iterdir() if p.is_dir() and not p.name.startswith("."))
    return (f"folders of the source are not copied: {', '.join(folders)}",) if folders else ()


def input_scale_for(activation_amax: float | None) -> Tensor | None:
    """float32 [], a multiplier."""
    if activation_amax is None:
        return None
    scale = torch.tensor(activation_amax / TENSOR_MAX)
    if not (scale.isfinite() and scale >= torch.finfo(torch.float32).tiny):
        raise CheckpointError(f"activation_amax must be a positive number, got {activation_amax}")
    return scale


def check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CheckpointError(f"device {device!r}: {str(error).splitlines()[0]}") from None


def fingerprint(shards: Shards, options: dict) -> str:
    """Of the source's files, its configs and the options: a resumed run must be the same run."""
    files = [(f.name, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in shards.files]
    told = json.dumps([files, shards.config, shards.quant_config, options], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def rewrite(
    plan: Plan, target: Path, progress: Callable[[int], None], max_shard_bytes: int = SHARD_BYTES
) -> Result:
    """Run the jobs that an earlier run has not finished, and write what they make."""
    shards, jobs = plan.shards, plan.jobs
    if target.resolve() == shards.path.resolve():
        raise CheckpointError(f"{target}: source and target are the same directory")
    tensors = [entry for job in jobs for entry in job.plan]
    files, source = {**side_files(shards), **plan.files}, fingerprint(shards, plan.options)
    with ShardWriter(target, tensors, files, max_shard_bytes, source) as writer:
        missing, reports, todo = set(writer.missing()), _read_lines(target / LINES), []
        for job in jobs:
            finished = not any(name in missing for name, _, _ in job.plan)
            if finished and all(m in reports for m in job.modules):
                progress(job.nbytes)
            else:
                todo.append(job)
        _write(shards, todo, writer, reports, progress)
        summary = {"options": plan.options, **summarize(reports.values())}
        writer.files[REPORT] = json.dumps(summary, indent=2).encode() + b"\n"
        (target / LINES).unlink()
        writer.close()
    return Result(target, reports, len(list(target.glob("*.safetensors"))), len(jobs) - len(todo))


def _write(shards: Shards, jobs: list[Job], writer: ShardWriter, reports: dict[str, dict], progress) -> None:
    """A job's report reaches its file before its tensors do: one that is missing there is made again."""
    largest = max(file.stat().st_size for file in shards.files)
    most_mapped, mapped = min(RELEASE_BYTES, largest // 4), 0
    with open(writer.path / LINES, "a", encoding="utf-8") as lines:
        for job, made in run_ahead((job, job.run) for job in jobs):
            for report in made.reports:
                reports[report["module"]] = report
                lines.write(json.dumps(report) + "\n")
            lines.flush()
            for name, tensor in made.tensors.items():
                writer.add(name, tensor)
            mapped += job.nbytes
            if mapped > most_mapped:
                shards.release()
                mapped = 0
            progress(job.nbytes)


def summarize(reports: Iterable[dict]) -> dict:
    """exact, changed and rounded add up to the modules; rounded: only alpha, by the inverse of a float32."""
    reports = list(reports)
    changed = sorted(
        (r for r in reports if "relative_rms" in r and not r["exact"]), key=lambda r: -r["relative_rms"]
    )
    rounded = [r["rounded"]["alpha"] for r in reports if "alpha" in r.get("rounded", ())]
    return {
        "modules": len(reports),
        "exact": len(reports) - len(changed) - len(rounded),
        "changed": len(changed),
        "rounded": len(rounded),
        "largest_rounding": max(rounded, default=0.0),
        "worst": changed[:WORST],
    }


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

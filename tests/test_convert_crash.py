"""A conversion that dies at any moment leaves nothing that is taken for whole, and can be resumed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import make, write_directory

pytest.importorskip("rich")

from nvfp4_moe import cli
from nvfp4_moe.checkpoint import CheckpointError, open_checkpoint
from nvfp4_moe.checkpoint.convert import plan_conversion

PACKAGE = Path(cli.__file__).parents[1]  # the one under test, perhaps installed
SHARD = 30_000  # bytes: the tiny checkpoint becomes some ten files
CALLS = ("open", "pwrite", "truncate", "fsync", "replace", "unlink")  # what changes the disk


class Died(BaseException):
    """Not an Exception: nothing may catch it and tidy up, as nothing does after kill -9."""


def die_at(monkeypatch, nth: int) -> list[str]:
    """The nth call that changes the disk does not return; earlier ones are listed."""
    made = []

    def dying(name: str, real):
        def call(*args, **kwargs):
            reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR)
            if not reads and len(made) == nth:
                raise Died(f"call {nth}, {name}")
            made.extend([] if reads else [name])
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, dying(name, getattr(os, name)))
    return made


def contents(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def convert(source: Path, target: Path, **options):
    return plan_conversion(source, **options).run(target, max_shard_bytes=SHARD)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("crash") / "source"
    make(path, "compressed-tensors-mxfp4", shards=2, sizes=(64, 96, 2))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def whole(source) -> tuple[dict[str, str], int]:
    """What an undisturbed conversion leaves, and how often it changes the disk."""
    with pytest.MonkeyPatch.context() as patch:
        made = die_at(patch, nth=-1)
        convert(source, source.parent / "whole")
    return contents(source.parent / "whole"), len(made)


def is_refused(target: Path) -> bool:
    if not target.exists():
        return True
    try:
        open_checkpoint(target)
    except CheckpointError:
        return True
    return False


def test_dying_at_any_change_of_the_disk_leaves_the_old_state_or_a_resumable_one(source, whole, tmp_path):
    want, count = whole
    assert count > 100 and len(want) > 6
    finished = 0
    for nth in sorted({*range(0, count, 4), *range(count - 24, count)}):
        target = tmp_path / str(nth)
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, nth)
            with pytest.raises(Died):
                convert(source, target)
        if is_refused(target):
            convert(source, target)
        else:
            finished += 1  # only the last sync of the directory was left
            assert nth == count - 1, nth
        assert contents(target) == want, nth
    assert finished <= 1


def test_dying_twice_is_no_worse(source, whole, tmp_path):
    want, count = whole
    for nth in (count // 2, count // 3, 5):
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, nth)
            with pytest.raises(Died):
                convert(source, tmp_path / "target")
        assert is_refused(tmp_path / "target")
    convert(source, tmp_path / "target")
    assert contents(tmp_path / "target") == want


def test_finished_files_are_kept_and_their_reports_too(source, whole, tmp_path):
    want, count = whole
    target = tmp_path / "target"
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, 2 * count // 3)
        with pytest.raises(Died):
            convert(source, target)
    before = {p.name: p.stat().st_ino for p in target.glob("*.safetensors")}
    assert 1 < len(before) < len(want)
    result = convert(source, target)
    after = {p.name: p.stat().st_ino for p in target.glob("*.safetensors")}
    assert {name: after[name] for name in before} == before, "a finished file was written again"
    assert result.skipped > 0 and len(result.reports) == 12
    assert contents(target) == want


def test_a_partial_file_or_a_torn_report_line_does_no_harm(source, whole, tmp_path):
    want, count = whole
    target = tmp_path / "target"
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, count // 2)
        with pytest.raises(Died):
            convert(source, target)
    partial = next(target.glob("*.partial"))
    partial.write_bytes(os.urandom(partial.stat().st_size))
    lines = target / "nvfp4-conversion.jsonl"
    lines.write_bytes(lines.read_bytes()[:-7])
    convert(source, target)
    assert contents(target) == want


def test_another_source_or_other_options_do_not_resume(source, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, 60)
        with pytest.raises(Died):
            convert(source, tmp_path / "target")
    with pytest.raises(CheckpointError, match="another source or with other options"):
        convert(source, tmp_path / "target", method="hybrid")
    make(tmp_path / "other", "compressed-tensors-mxfp4", shards=2, sizes=(64, 96, 2), seed=1)
    with pytest.raises(CheckpointError, match="another source or with other options"):
        convert(tmp_path / "other", tmp_path / "target")


# ---- real processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """30 MB in 12 files."""
    path, tensors = tmp_path_factory.mktemp("large") / "source", {}
    for e in range(12):
        for proj in ("gate_proj", "up_proj"):
            name = f"model.layers.0.mlp.experts.{e}.{proj}"
            tensors[f"{name}.weight_packed"] = torch.randint(0, 256, (1152, 2048), dtype=torch.uint8)
            tensors[f"{name}.weight_scale"] = torch.randint(110, 118, (1152, 128)).to(torch.uint8)
    write_directory(path, tensors, {"quantization_config": {"quant_method": "compressed-tensors"}}, shards=12)
    return path


def start(source: Path, target: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "nvfp4_moe", "convert", str(source), str(target), "--shard-size", "5MB"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in shells' background jobs
    )  # fmt: skip


def wait_for_files(target: Path, count: int, process: subprocess.Popen) -> None:
    until = time.time() + 60
    while len(list(target.glob("*.safetensors"))) < count and process.poll() is None:
        assert time.time() < until, "no file appeared"
        time.sleep(0.002)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_process_that_is_killed_resumes(kill, large, tmp_path, capsys):
    for attempt in range(10):  # on a busy machine it may be faster than we are
        target = tmp_path / str(attempt)
        process = start(large, target)
        wait_for_files(target, 2, process)
        process.send_signal(kill)
        _, err = process.communicate(timeout=60)
        if is_refused(target):
            break
    assert process.returncode == (130 if kill == signal.SIGINT else -kill)
    if kill == signal.SIGINT:
        assert "interrupted; finished shards are kept" in err and "Traceback" not in err
    assert cli.main(["convert", str(large), str(target), "--shard-size", "5MB"]) == 0
    out = capsys.readouterr().out
    assert "resumed" in out and "24 of 24 matrices kept every bit" in out
    before, after = open_checkpoint(large), open_checkpoint(target)
    for name in before.modules:
        assert torch.equal(after.weight(name).packed, before.weight(name).packed)


def experts(path: Path, count: int, rows: int, files: int) -> Path:
    tensors = {}
    for e in range(count):
        name = f"model.layers.0.mlp.experts.{e}.up_proj"
        tensors[f"{name}.weight_packed"] = torch.randint(0, 256, (rows, 3760), dtype=torch.uint8)
        tensors[f"{name}.weight_scale"] = torch.randint(110, 118, (rows, 235)).to(torch.uint8)
    write_directory(path, tensors, {}, shards=files)
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_peak_memory_is_below_two_of_the_largest_files(tmp_path):
    """Above what a process has that has converted something: 192 MB in three files, of which two thirds would
    be too much to keep. By two workers: each more has an expert or two in memory."""
    small, source = experts(tmp_path / "small", 4, 64, 1), experts(tmp_path / "source", 48, 1024, 3)
    largest = max(p.stat().st_size for p in source.glob("*.safetensors"))
    code = (  # not getrusage, whose ru_maxrss outlives exec: it would be pytest's own
        "import sys, nvfp4_moe.cli as cli\n"
        "from nvfp4_moe.checkpoint import ahead\n"
        "ahead.WORKERS = 2\n"
        "def status(key): return int(open('/proc/self/status').read().split(key + ':')[1].split()[0])\n"
        "assert cli.main(['convert', sys.argv[1], sys.argv[1] + '-out']) == 0\n"
        "before = status('VmRSS')\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak is now
        "assert cli.main(['convert', sys.argv[2], sys.argv[2] + '-out', '--shard-size', '65MB']) == 0\n"
        "print(status('VmHWM') - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", code, str(small), str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1]) * 1024
    assert largest / 8 < grown < 2 * largest, grown / largest

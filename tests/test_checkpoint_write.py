"""ShardWriter: what a crash leaves is taken for whole by nobody, and the next run finishes it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_file

from nvfp4_moe.checkpoint import CheckpointError, Shards, ShardWriter
from nvfp4_moe.checkpoint.shards import INDEX, JOURNAL

TENSORS = {f"t{i}": torch.randn(8, 4 + i).bfloat16() for i in range(5)} | {
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 2),
    "sf": torch.arange(40, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "e8m0": torch.arange(9, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "fp4": torch.arange(8, dtype=torch.uint8).view(2, 4).view(torch.float4_e2m1fn_x2),
    "int8": torch.arange(-3, 4, dtype=torch.int8),
}
FILES = {"config.json": b'{"model_type": "m"}', "tokenizer.json": b"{}"}


def plan(tensors=TENSORS):
    for name, t in tensors.items():
        doubled = t.dtype == torch.float4_e2m1fn_x2
        yield name, t.dtype, (*t.shape[:-1], 2 * t.shape[-1]) if doubled else tuple(t.shape)


def writer(path, **options) -> ShardWriter:
    return ShardWriter(path, plan(), FILES, **{"max_shard_bytes": 200, **options})


def write(path, **options) -> list[str]:
    """Write all, or what is missing; gives the names that were."""
    w = writer(path, **options)
    missing = w.missing()
    for name in missing:
        w.add(name, TENSORS[name])
    w.close()
    return missing


def content(path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def assert_whole(path) -> None:
    shards = Shards(path)
    assert shards.warnings == [] and set(shards) == set(TENSORS) and shards.config == {"model_type": "m"}
    for name, tensor in TENSORS.items():
        assert shards[name].dtype == tensor.dtype and shards[name].shape == tensor.shape
        assert torch.equal(
            shards[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name


# ---- what is written ----


@pytest.mark.parametrize("limit", [1, 200, 10**9])
def test_what_is_written_is_read_again(tmp_path, limit):
    write(tmp_path, max_shard_bytes=limit)
    assert_whole(tmp_path)
    shards = [p for p in tmp_path.iterdir() if p.suffix == ".safetensors"]
    assert len(shards) == {1: 11, 10**9: 1}.get(limit, len(shards))
    assert (tmp_path / INDEX).exists() == (len(shards) > 1)
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / JOURNAL).exists()


def test_one_shard_has_the_bytes_of_a_file_written_by_hand(tmp_path):
    same = {n: t for n, t in TENSORS.items() if n != "empty"}
    w = ShardWriter(tmp_path / "out", plan(same))
    for name, tensor in same.items():
        w.add(name, tensor)
    w.close()
    write_file(tmp_path / "hand", same, {"format": "pt"})
    ours, hand = ((p).read_bytes() for p in (tmp_path / "out/model.safetensors", tmp_path / "hand"))
    start = [8 + int.from_bytes(b[:8], "little") for b in (ours, hand)]
    assert json.loads(ours[8 : start[0]]) == json.loads(hand[8 : start[1]])
    assert ours[start[0] :] == hand[start[1] :]


def test_shards_hold_at_most_the_limit_and_the_index_counts_bytes(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    for shard in Shards(tmp_path).files:
        assert sum(i.nbytes for i in Shards(tmp_path).tensors.values() if i.file == shard) <= 200


def test_tensors_come_in_any_order_and_from_any_memory_layout(tmp_path):
    w = writer(tmp_path)
    for name in reversed(TENSORS):
        tensor = TENSORS[name]
        w.add(
            name, tensor.T.contiguous().T if tensor.dim() == 2 and tensor.dtype == torch.bfloat16 else tensor
        )
    w.close()
    assert_whole(tmp_path)


def test_a_system_that_writes_a_little_at_a_time_is_asked_again(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:7], offset))
    write(tmp_path)
    assert_whole(tmp_path)


def test_side_files_may_be_paths(tmp_path):
    (tmp_path / "chat.jinja").write_text("hello")
    w = ShardWriter(tmp_path / "out", [], {"chat.jinja": tmp_path / "chat.jinja"})
    w.close()
    assert (tmp_path / "out/chat.jinja").read_text() == "hello"


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("other", torch.zeros(1), "'other' is not in the plan"),
        ("t0", torch.zeros(8, 4), r"'t0' was planned as BF16 \[8, 4\], got F32 \[8, 4\]"),
        ("t0", torch.zeros(4, 8).bfloat16(), r"planned as BF16 \[8, 4\], got BF16 \[4, 8\]"),
        ("scalar", torch.zeros(1), r"planned as F32 \[\], got F32 \[1\]"),
    ],
)
def test_a_tensor_that_was_not_planned_is_refused(tmp_path, name, tensor, says):
    with pytest.raises(CheckpointError, match=says):
        writer(tmp_path).add(name, tensor)


def test_twice_the_same_tensor_or_too_few_are_refused(tmp_path):
    w = writer(tmp_path)
    w.add("t0", TENSORS["t0"])
    with pytest.raises(CheckpointError, match="'t0' was added twice"):
        w.add("t0", TENSORS["t0"])
    with pytest.raises(CheckpointError, match="'t0' and 10 more were never added"):
        w.close()
    with pytest.raises(CheckpointError, match="'a' is in the plan twice"):
        ShardWriter(tmp_path / "b", [("a", "U8", (1,)), ("a", "U8", (1,))])


def test_nothing_is_ever_overwritten(tmp_path):
    write(tmp_path)
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="not empty; nothing is ever overwritten"):
        writer(tmp_path)
    assert content(tmp_path) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        writer(tmp_path / "notes")


def test_an_unfinished_directory_of_another_plan_is_not_continued(tmp_path):
    with writer(tmp_path, source="model A, best") as w:
        w.add("t0", TENSORS["t0"])
    for options in ({"source": "model A, hybrid"}, {"source": "model A, best", "max_shard_bytes": 100}):
        with pytest.raises(
            CheckpointError, match="unfinished conversion of another source or with other options"
        ):
            writer(tmp_path, **options)
    assert len(writer(tmp_path, source="model A, best").missing()) == 11


def test_two_at_once_do_not_tear_each_others_files(tmp_path):
    first = writer(tmp_path)
    first.add("t0", TENSORS["t0"])
    with pytest.raises(CheckpointError, match="another conversion is writing it"):
        writer(tmp_path)
    code = (
        "import sys; from nvfp4_moe.checkpoint import ShardWriter\n"
        "ShardWriter(sys.argv[1], [('a', 'U8', (1,))])"
    )
    other = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert "CheckpointError" in other.stderr and not list(tmp_path.glob("*a*.partial.partial"))
    for name in TENSORS:
        if name != "t0":
            first.add(name, TENSORS[name])
    first.close()
    assert_whole(tmp_path)


def test_a_writer_that_gave_up_lets_the_directory_go(tmp_path):
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    with pytest.raises(CheckpointError, match="twice"), writer(tmp_path) as w:
        w.add("t0", TENSORS["t0"])
        w.add("t0", TENSORS["t0"])
    assert not before or len(list(descriptors.iterdir())) == before
    write(tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b'{"plan": 3}'])
def test_a_journal_that_is_none_is_a_clear_error(tmp_path, text):
    (tmp_path / JOURNAL).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"nvfp4-unfinished\.json|another source or with other options"):
        writer(tmp_path)


def test_our_reader_refuses_an_unfinished_directory_by_name(tmp_path):
    w = writer(tmp_path)
    for name in TENSORS:
        w.add(name, TENSORS[name])
    with pytest.raises(
        CheckpointError, match=r"an unfinished conversion \(nvfp4-unfinished\.json is there\)"
    ):
        Shards(tmp_path)


# ---- crashes ----

CALLS = ("open", "truncate", "pwrite", "fsync", "replace", "unlink")


class Crash(BaseException):
    pass


def crash_at(monkeypatch, moment: int) -> list[str]:
    """The moment-th call into the system never happens; of a write, half does. Gives what was called."""
    log = []

    def wrap(name, real):
        def call(*args, **more):
            log.append(name)
            if len(log) - 1 == moment:
                if name == "pwrite":
                    real(args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2], args[2])
                raise Crash
            return real(*args, **more)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return log


def test_a_crash_at_any_moment_is_never_taken_for_whole_and_is_resumed(tmp_path, monkeypatch):
    write(tmp_path / "undisturbed")
    want = content(tmp_path / "undisturbed")
    moment, kept = 0, 0
    while True:
        path = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            crash_at(patch, moment)
            try:
                write(path)
                break  # fewer calls than that
            except Crash:
                pass
        if (path / JOURNAL).exists() or not (path / "config.json").exists():
            with pytest.raises(CheckpointError):
                Shards(path)
        if (path / "config.json").exists():  # other loaders would go ahead: everything must be there
            there = content(path)
            assert {n: b for n, b in there.items() if n != JOURNAL} == want
        if (path / JOURNAL).exists() or not (path / "config.json").exists():
            kept += len(write(path)) < len(TENSORS)
        assert content(path) == want, f"after a crash at call {moment}"
        moment += 1
    assert moment > 50 and kept > 30  # most runs found finished shards of the first one


def test_a_crash_of_the_resumed_run_is_resumed_too(tmp_path, monkeypatch):
    write(tmp_path / "undisturbed")
    path, runs = tmp_path / "out", 0
    while not (path / "config.json").exists() or (path / JOURNAL).exists():
        with monkeypatch.context() as patch:
            crash_at(patch, 16 + runs % 4)
            try:
                write(path)
            except Crash:
                runs += 1
        assert runs < 100
    assert runs > 2 and content(path) == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage", ["cut", "another file"])
def test_a_finished_file_that_was_damaged_later_is_written_again(tmp_path, damage):
    with writer(tmp_path) as w:
        for name in ("t0", "t1"):
            w.add(name, TENSORS[name])
    done = next(tmp_path.glob("*.safetensors"))
    if damage == "cut":
        done.write_bytes(done.read_bytes()[:-1])
    else:
        write_file(done, {"t0": TENSORS["t0"], "t1": TENSORS["t1"].half()})
    assert write(tmp_path) == list(TENSORS)
    assert_whole(tmp_path)


def test_files_are_synced_before_they_get_their_name_and_the_directory_after(tmp_path, monkeypatch):
    log = crash_at(monkeypatch, -1)
    write(tmp_path)
    for i, call in enumerate(log):
        if call == "replace":
            assert log[i - 1] == "fsync" and "fsync" in log[i + 1 : i + 3]
    assert log[-3:-1] == ["unlink", "open"] and log[-1] == "fsync"  # the journal goes last


def test_a_killed_process_leaves_what_the_next_one_finishes(tmp_path):
    child = (
        "import os, signal, sys, torch\n"
        "from nvfp4_moe.checkpoint import ShardWriter\n"
        "tensors = torch.load(sys.argv[2])\n"
        "plan = [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]\n"
        "w = ShardWriter(sys.argv[1], plan, {'config.json': b'{}'}, 200)\n"
        "for i, name in enumerate(w.missing()):\n"
        "    if i == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    w.add(name, tensors[name])\n"
    )
    some = {n: t for n, t in TENSORS.items() if n.startswith("t")}
    torch.save(some, tmp_path / "tensors.pt")
    run = subprocess.run([sys.executable, "-c", child, tmp_path / "out", tmp_path / "tensors.pt"])
    assert run.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="unfinished"):
        Shards(tmp_path / "out")
    w = ShardWriter(tmp_path / "out", plan(some), {"config.json": b"{}"}, 200)
    assert 0 < len(w.missing()) < 5
    for name in w.missing():
        w.add(name, some[name])
    w.close()
    assert all(torch.equal(Shards(tmp_path / "out")[n], t) for n, t in some.items())

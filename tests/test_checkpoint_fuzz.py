"""Files from strangers: every way to be broken gives one clear error; nothing crashes, no code runs, no file
outside the directory is opened."""

import json
import os
import pickle
import random
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from checkpoints import make, write_directory, write_file, write_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvfp4_moe.checkpoint import Checkpoint, CheckpointError, Shards, open_checkpoint
from nvfp4_moe.checkpoint.header import MAX_HEADER

opened: list[str] = []
watching = False


def _note(event, args):  # an audit hook stays for the life of the process
    if watching and event == "open" and isinstance(args[0], (str, bytes)):
        opened.append(os.fsdecode(args[0]))


sys.addaudithook(_note)


@contextmanager
def only_reads_within(*paths):
    """Whatever is opened lies in one of `paths`."""
    global watching
    opened.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
    homes = [os.path.realpath(p) for p in paths]
    outside = [f for f in opened if not any(os.path.realpath(f).startswith(h) for h in homes)]
    assert not outside, outside


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def one(**changed) -> bytes:
    return json.dumps({"x": entry(**changed)}).encode()


DATA = bytes(8)
ADVERSARIAL = {
    "no JSON": (b"{", DATA),
    "JSON of another kind": (b"[1, 2]", DATA),
    "not UTF-8": (b'{"\xff\xfe": 1}', DATA),
    "nested beyond Python's stack": (b'{"x":' + b"[" * 200_000, DATA),
    "a number of a million digits": (b'{"x": ' + b"9" * 1_000_000 + b"}", DATA),
    "a name twice": (b'{"x": 1, "x": 2}', DATA),
    "a key twice within": (
        b'{"x": {"dtype": "U8", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        DATA,
    ),
    "metadata that is no mapping": (b'{"__metadata__": [1]}', b""),
    "metadata of numbers": (b'{"__metadata__": {"a": 1}}', b""),
    "an entry that is no mapping": (b'{"x": 3}', DATA),
    "a key missing": (b'{"x": {"dtype": "F32", "shape": [2]}}', DATA),
    "a key too many": (json.dumps({"x": entry(more=1)}).encode(), DATA),
    "an unknown type": (one(dtype="F128"), DATA),
    "a type that is no string": (one(dtype=["F32"]), DATA),
    "a negative size": (one(shape=(-2,)), DATA),
    "a fractional size": (one(shape=(2.0,)), DATA),
    "a size that is a bool": (one(shape=(True, 2)), DATA),
    "a size that overflows": (one(shape=(2**63, 2**63)), DATA),
    "a product that overflows to 2": (one(shape=(2**62 + 1, 4, 0)), b""),
    "thousands of dimensions": (one(shape=(1,) * 5000), DATA),
    "offsets of strings": (one(offsets=("0", "8")), DATA),
    "three offsets": (one(offsets=(0, 4, 8)), DATA),
    "offsets backwards": (one(offsets=(8, 0)), DATA),
    "negative offsets": (one(offsets=(-8, 0)), DATA),
    "offsets beyond the file": (one(offsets=(8, 16)), DATA),
    "offsets of another size": (one(offsets=(0, 4)), DATA),
    "a hole": (json.dumps({"x": entry(), "y": entry(offsets=(16, 24))}).encode(), bytes(24)),
    "an overlap": (json.dumps({"x": entry(), "y": entry(offsets=(4, 12))}).encode(), bytes(12)),
    "two names for the same bytes": (json.dumps({"x": entry(), "y": entry()}).encode(), DATA),
    "bytes at the end": (one(), DATA + b"\0"),
    "data missing": (one(), DATA[:-1]),
    "no data": (one(), b""),
    "half a byte": (one(dtype="F4", shape=(3,), offsets=(0, 2)), bytes(2)),
    "an empty name": (json.dumps({"": entry()}).encode(), DATA),
    "a name that paints the terminal": (json.dumps({"x\x1b[31m": entry()}).encode(), DATA),
    "a name with a newline": (json.dumps({"x\ny": entry()}).encode(), DATA),
}


@pytest.mark.parametrize("what", ADVERSARIAL)
def test_an_adversarial_header_is_one_clear_error(tmp_path, what):
    write_raw(tmp_path / "model.safetensors", *ADVERSARIAL[what])
    with only_reads_within(tmp_path), pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    text = str(error.value)
    assert str(tmp_path / "model.safetensors") in text and len(text) < 700 and text.isprintable()


@pytest.mark.parametrize("length", [0, 1, 9, MAX_HEADER, MAX_HEADER + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_allocates_nothing(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_header_beyond_the_limit_is_refused_unread(tmp_path):
    """Of a file that is as long as it says: sparse, so that it costs nothing."""
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER)
    with pytest.raises(CheckpointError, match=f"at most {MAX_HEADER}"):
        open_checkpoint(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_file(tmp_path / "whole", {"a": torch.randn(3), "b": torch.zeros(2, dtype=torch.uint8)})
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (pickle.dumps({"a": 1}, 2), "a pickle"),
        (pickle.dumps({"a": 1}), "a pickle"),
        (b"PK\x03\x04" + bytes(40), "as torch.save writes: pickled"),
        (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer"),
        (b"", "truncated"),
    ],
)
def test_other_files_under_the_name_are_told_apart(tmp_path, start, what):
    (tmp_path / "model.safetensors").write_bytes(start)
    with pytest.raises(CheckpointError, match=what):
        open_checkpoint(tmp_path)


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_no_code_in_a_pickle_runs(tmp_path):
    ran = tmp_path / "ran"
    pickles = ("pytorch_model.bin", "model.pt", "model.safetensors", "optimizer.pkl", "config.json")
    for i, name in enumerate(pickles):
        path = tmp_path / str(i)
        path.mkdir()
        (path / name).write_bytes(pickle.dumps(Bomb(ran)))
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
        torch.save(Bomb(ran), path / name)
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    path = make(tmp_path / "good", "modelopt").path
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (path / name).write_bytes(pickle.dumps(Bomb(ran)))
    checkpoint = open_checkpoint(path)
    assert any("pickles are not read: model.pt, pytorch_model.bin" in w for w in checkpoint.warnings)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Bomb(ran)))
    assert ran.exists()  # the bomb does work


def test_a_pipe_under_the_name_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    code = "import sys; from nvfp4_moe.checkpoint import Shards; Shards(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert "CheckpointError" in run.stderr and "not a regular file" in run.stderr


def test_a_directory_under_the_name_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_reading_a_whole_checkpoint_opens_nothing_outside(tmp_path):
    truth = make(tmp_path / "in", "gpt-oss", shards=2)
    with only_reads_within(tmp_path / "in"):
        checkpoint = open_checkpoint(truth.path)
        for prefix in checkpoint.moe_layers():
            checkpoint.moe(prefix)
    assert len(opened) >= 4  # config, index, shards: the hook does see them


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../outside.safetensors", "C:\\outside"])
def test_tensor_names_are_never_paths(tmp_path, name):
    write_directory(tmp_path / "in", {name: torch.ones(2)}, {})
    with only_reads_within(tmp_path / "in"):
        assert torch.equal(Shards(tmp_path / "in")[name], torch.ones(2))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": NaN, "a": 1}', '{"quantization_config": 3}', "\xff", "{" * 99999]
)
def test_configs_that_are_none_are_refused(tmp_path, text):
    make(tmp_path, "modelopt")
    for name in ("config.json", "hf_quant_config.json"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(
            text.replace("quantization_config", "quantization") if "hf" in name else text
        )
        with pytest.raises(CheckpointError, match="config"):
            open_checkpoint(tmp_path)
        (tmp_path / name).write_bytes(before)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.text(max_size=3)
    | st.just("NVFP4")
    | st.just("re:("),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "quant_method", "quant_algo", "ignore", "config_groups", "quantized_layers", "moe_quant_algo",
    "group_size",
    "exclude", "modules_to_not_convert", "global_quant_config", "targets", "weights", "input_activations",
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), JUNK | st.dictionaries(st.sampled_from(KEYS), JUNK)))
def test_any_quantization_config_opens_or_is_a_clear_error(tiny, tmp_path, said):
    path = tiny("compressed-tensors-nvfp4").path
    shards = Shards(path)
    shards.config = {"quantization_config": said}
    try:
        checkpoint = Checkpoint(shards)
    except CheckpointError:
        return
    assert len(checkpoint.modules) == 24
    assert {m.compute for m in checkpoint.modules.values()} <= {"nvfp4", "bf16"}


def test_ten_thousand_corrupted_bytes_never_crash(tmp_path):
    """Bytes of header and data changed at random: it opens, or one CheckpointError comes; and every tensor
    that opens can be read to its last byte."""
    make(tmp_path, "modelopt", sizes=(32, 32, 1), layers=1)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    refused = read = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 25))):
            at = rng.randrange(8 + header) if rng.random() < 0.8 else rng.randrange(len(whole))
            damaged[at] = rng.randrange(256) if rng.random() < 0.5 else rng.choice(b'0123456789{}[],:"')
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(tmp_path, strict=False)
            for name in checkpoint.modules:
                checkpoint.weight(name, check=False).dequantize()
            for name in checkpoint.plain():
                checkpoint.shards[name].view(-1).view(torch.uint8).sum()
            read += 1
        except CheckpointError:
            refused += 1
    assert refused > 150 and read > 40

"""Shards: a directory as one lazy mapping. The index is compared, not believed. Nothing outside is read."""

import json
import os

import pytest
import torch
from checkpoints import make, write_directory, write_file, write_raw
from compare import assert_same_bits

from nvfp4_moe.checkpoint import CheckpointError, Shards
from nvfp4_moe.checkpoint.shards import INDEX

SAMPLES = {
    "bool": torch.tensor([True, False, True]),
    "u8": torch.arange(7, dtype=torch.uint8),
    "bf16": torch.randn(3, 5).bfloat16(),
    "f32": torch.randn(2, 3, 4),
    "scalar": torch.tensor(2.5),
    "i64": torch.tensor([-1, 2**40]),
    "e4m3": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "e8m0": torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "fp4": torch.arange(8, dtype=torch.uint8).view(2, 4).view(torch.float4_e2m1fn_x2),
    "empty": torch.zeros(0, 4),
    "odd": torch.randn(5),  # lies at an offset that is no multiple of 4
}


def test_every_type_comes_out_with_its_bytes(tmp_path):
    write_directory(tmp_path, SAMPLES, {})
    shards = Shards(tmp_path)
    assert set(shards) == set(SAMPLES) and len(shards) == len(SAMPLES)
    for name, tensor in SAMPLES.items():
        got = shards[name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape, name
        assert got.data_ptr() % got.element_size() == 0, name  # wherever it lies in the file
        assert torch.equal(got.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    assert shards.tensors["fp4"].shape == (2, 8) and shards.tensors["fp4"].dtype == "F4"  # values, not bytes


def test_tensors_are_spread_over_shards_and_read_as_one(tmp_path):
    write_directory(tmp_path, SAMPLES, {"a": 1}, shards=4)
    shards = Shards(tmp_path)
    assert len(shards.files) == 4 and shards.config == {"a": 1} and shards.warnings == []
    assert all(
        torch.equal(shards[n].view(torch.uint8), t.view(torch.uint8)) for n, t in SAMPLES.items() if t.dim()
    )


def test_rows_are_the_rows(tmp_path):
    write_directory(tmp_path, {"x": torch.randn(6, 3, 2), "s": torch.tensor(1.0)}, {})
    shards = Shards(tmp_path)
    x = shards["x"]
    for index in (0, 5, -1, slice(2, 4), slice(None), slice(4, 2), slice(0, 6, 2)):
        assert_same_bits(shards.rows("x", index), x[index], str(index))
    with pytest.raises(IndexError):
        shards.rows("x", 6)
    with pytest.raises(CheckpointError, match="'s' is a scalar"):
        shards.rows("s", 0)


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path):
    write_directory(tmp_path, {"x": torch.zeros(4)}, {})
    before = (tmp_path / "model.safetensors").read_bytes()
    shards = Shards(tmp_path)
    shards["x"].fill_(7)
    shards.release()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(shards["x"], torch.zeros(4))


def test_a_tensor_outlives_its_shards(tmp_path):
    write_directory(tmp_path, {"x": torch.arange(1000.0)}, {})
    shards = Shards(tmp_path)
    x = shards["x"]
    shards.release()
    del shards
    os.remove(tmp_path / "model.safetensors")
    assert float(x.sum()) == 499500


def test_a_file_larger_than_memory_opens_at_once_and_gives_single_rows(tmp_path):
    """A sparse file of 256 GiB: no page is touched but the header's and the row's."""
    rows, width = 1 << 20, 1 << 18
    header = {"big": {"dtype": "U8", "shape": [rows, width], "data_offsets": [0, rows * width]}}
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), b"")
    with open(tmp_path / "model.safetensors", "r+b") as file:
        start = file.seek(0, os.SEEK_END)
        try:
            file.truncate(start + rows * width)
        except OSError as error:
            pytest.skip(f"no sparse file of that size here: {error}")
        file.seek(start + 77 * width)
        file.write(b"\x05" * width)
    shards = Shards(tmp_path)
    assert shards["big"].shape == (rows, width)
    assert shards.rows("big", 77).sum() == 5 * width and shards.rows("big", 78).sum() == 0


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path):
    write_directory(tmp_path, {"x": torch.zeros(4096), "y": torch.zeros(4096)}, {})
    shards = Shards(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 20_000)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: shrank to 20000 bytes since it was opened"
    ):
        shards["y"]
    assert shards.get("z") is None and shards.get("x") is not None


# ---- the index ----


@pytest.fixture
def indexed(tmp_path):
    make(tmp_path, "modelopt", shards=3)

    def change(edit):
        index = json.loads((tmp_path / INDEX).read_text())
        edit(index)
        (tmp_path / INDEX).write_text(json.dumps(index))
        return tmp_path

    return change


def test_an_index_that_lacks_the_scales_changes_nothing(indexed):
    """DeepSeek's quantize_to_nvfp4.py never adds them."""

    def edit(index):
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "scale" not in n}
        index["metadata"] = {}

    shards = Shards(indexed(edit))
    assert sum(n.endswith("weight_scale_2") for n in shards) == 24
    assert any("the index lacks" in w and "71 more" in w for w in shards.warnings), shards.warnings


def test_names_that_no_shard_has_and_wrong_places_and_sizes_are_noted(indexed):
    def edit(index):
        index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
        index["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors"
        index["metadata"]["total_size"] = 17

    warnings = " | ".join(Shards(indexed(edit)).warnings)
    assert "names, and no shard has ghost" in warnings
    assert "puts into another shard lm_head.weight" in warnings and "total_size 17" in warnings


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "C:\\x"]
)
def test_an_index_that_points_elsewhere_is_refused(indexed, file):
    path = indexed(lambda index: index["weight_map"].update(x=file))
    with pytest.raises(CheckpointError, match="is not the name of a file in this directory"):
        Shards(path)


def test_a_shard_that_only_the_index_has_is_missing(indexed):
    path = indexed(lambda index: index["weight_map"].update(x="model-00004-of-00003.safetensors"))
    with pytest.raises(CheckpointError, match=r"shard 'model-00004-of-00003\.safetensors' is missing"):
        Shards(path)


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "null", '{"a":1,"a":2}']
)
def test_an_index_that_is_none_is_refused(indexed, index):
    path = indexed(lambda _: None)
    (path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Shards(path)


def test_missing_shards_are_seen_without_an_index(tmp_path):
    for gone in (1, 2, 3):
        path = tmp_path / str(gone)
        make(path, "modelopt", shards=3, index=False)
        assert "and no model.safetensors.index.json" in Shards(path).warnings[0]
        (path / f"model-{gone:05d}-of-00003.safetensors").unlink()
        with pytest.raises(
            CheckpointError, match=f"model-{gone:05d}-of-00003.safetensors is missing: 2 of 3"
        ):
            Shards(path)


# ---- the directory ----


def test_a_name_in_two_shards_is_refused(tmp_path):
    write_directory(tmp_path, {"x": torch.zeros(1)}, {})
    write_file(tmp_path / "second.safetensors", {"x": torch.ones(1)})
    with pytest.raises(
        CheckpointError, match=r"'x' is both in .*model\.safetensors and in .*second\.safetensors"
    ):
        Shards(tmp_path)


def test_hidden_and_partial_files_are_not_shards(tmp_path):
    write_directory(tmp_path, {"x": torch.zeros(1)}, {})
    (tmp_path / "._model.safetensors").write_bytes(b"junk of a Mac")
    (tmp_path / "model-2.safetensors.partial").write_bytes(b"half")
    assert list(Shards(tmp_path)) == ["x"]


def test_links_within_the_directory_and_the_hubs_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_file(blobs / "9f86d0", {"x": torch.ones(2)})
    (blobs / "60303a").write_text('{"model_type": "m"}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/9f86d0")
    (snapshot / "config.json").symlink_to("../../blobs/60303a")
    assert torch.equal(Shards(snapshot)["x"], torch.ones(2)) and Shards(snapshot).config == {
        "model_type": "m"
    }


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "hf_quant_config.json", INDEX])
def test_links_out_of_the_directory_are_refused(tmp_path, name):
    inside, outside = tmp_path / "in", tmp_path / "out"
    write_directory(inside, {"x": torch.ones(2)}, {})
    write_directory(outside, {"y": torch.ones(2)}, {})
    target = outside / ("model.safetensors" if name == "model.safetensors" else "config.json")
    (inside / name).unlink(missing_ok=True)
    (inside / name).symlink_to(target)
    with pytest.raises(CheckpointError, match="a link out of the directory"):
        Shards(inside)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "no .*safetensors files"),
        (["pytorch_model.bin"], r"only pickles \(pytorch_model\.bin\); reading a pickle runs the code in it"),
        (["model.pt"], "only pickles"),
    ],
)
def test_a_directory_without_shards_says_what_it_has(tmp_path, files, says):
    for file in files:
        (tmp_path / file).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match=says):
        Shards(tmp_path)


def test_paths_that_are_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="not a directory"):
            Shards(path)

"""convert and quantize on a GPU write the CPU's files byte for byte; the doctor there finds nothing wrong."""

import json

import pytest
import torch
from checkpoints import make, write_directory
from conftest import missing_gpu
from test_convert import METHODS, TARGETS, one_pair, random_pair
from test_ops import NAMES

pytest.importorskip("rich")

from nvfp4_moe import cli
from nvfp4_moe.checkpoint.convert import plan_conversion
from nvfp4_moe.checkpoint.quantize import plan_quantization
from nvfp4_moe.diagnostics import environment, exit_code

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing_gpu() is not None, reason=str(missing_gpu()))]
REPORT = "nvfp4-conversion.json"


def assert_same_files(cpu, cuda) -> None:
    assert {p.name for p in cpu.iterdir()} == {p.name for p in cuda.iterdir()}
    for path in cpu.iterdir():
        if path.name != REPORT:
            assert path.read_bytes() == (cuda / path.name).read_bytes(), path.name
    ours, theirs = (json.loads((p / REPORT).read_text()) for p in (cpu, cuda))
    for worst in ours["worst"] + theirs["worst"]:  # a sum over a matrix, in another order
        worst["relative_rms"] = pytest.approx(worst["relative_rms"], rel=1e-4)
    assert [ours[k] for k in ("modules", "exact", "changed")] == [
        theirs[k] for k in ("modules", "exact", "changed")
    ]
    named = [{w["module"]: w["relative_rms"] for w in report["worst"]} for report in (ours, theirs)]
    assert all(named[0][m].expected == named[1][m] for m in named[0].keys() & named[1].keys())


@pytest.mark.parametrize("form, to", TARGETS, ids=str)
def test_convert_writes_the_cpus_files(form, to, tmp_path):
    make(tmp_path / "source", form, shards=2)
    for device in ("cpu", "cuda"):
        plan_conversion(tmp_path / "source", to, device=device).run(tmp_path / device, max_shard_bytes=10**5)
    assert_same_files(tmp_path / "cpu", tmp_path / "cuda")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [0, 12, 30])
def test_convert_writes_the_cpus_files_beyond_the_window_too(method, shift, tmp_path):
    packed, e8m0 = random_pair(96, 256)
    e8m0[1][7:] += shift
    packed[0][3, :16], e8m0[0][3, 0] = 0x80, 0xFF  # zeros under a NaN
    one_pair(tmp_path / "source", packed, e8m0)
    for device in ("cpu", "cuda"):
        plan_conversion(tmp_path / "source", "modelopt", method, device=device).run(tmp_path / device)
    assert_same_files(tmp_path / "cpu", tmp_path / "cuda")


@pytest.mark.parametrize("method", ["amax", "four_over_six", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_writes_the_cpus_files(method, dtype, tmp_path):
    tensors = {}
    for e in range(3):
        for proj, shape in (("gate_proj", (352, 512)), ("up_proj", (352, 512)), ("down_proj", (512, 352))):
            tensors[f"model.layers.0.mlp.experts.{e}.{proj}.weight"] = (torch.randn(shape) * 0.02).to(dtype)
    write_directory(tmp_path / "source", tensors, {})
    for device in ("cpu", "cuda"):
        plan_quantization(tmp_path / "source", method=method, device=device).run(tmp_path / device)
    assert_same_files(tmp_path / "cpu", tmp_path / "cuda")


def test_an_exponent_without_a_value_is_the_same_error(tmp_path):
    packed, e8m0 = random_pair()
    e8m0[1][2, 1], packed[1][2, 20] = 254, 0x11
    one_pair(tmp_path / "source", packed, e8m0)
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=r"up_proj.*e8m0 byte 254 at \[10, 1\]"):
            plan_conversion(tmp_path / "source", device=device).run(tmp_path / device)


def test_the_doctor_finds_this_machine_sound(capsys):
    found = environment()
    assert exit_code(found) == 0, [f for f in found if f.severity in ("warning", "error")]
    assert {f.title.split()[0] for f in found if " on cuda:0" in f.title} == set(NAMES)
    assert any(f.check == "GPU" and "cuda:0" in f.title for f in found)
    assert cli.main(["doctor"]) == 0
    assert "on cuda:0: the reference's result" in " ".join(capsys.readouterr().out.split())


def test_the_commands_run_there(tmp_path, capsys):
    make(tmp_path / "mx", "deepseek-v4")
    make(tmp_path / "bf16", "bf16")
    for command, source in (("convert", "mx"), ("quantize", "bf16")):
        assert cli.main([command, str(tmp_path / source), str(tmp_path / command), "--device", "cuda"]) == 0
        assert cli.main(["doctor", str(tmp_path / command)]) == 0
    assert cli.main(["bench", "--tokens", "1", "64", "--seconds", "0.05"]) == 0
    assert "cuda" in capsys.readouterr().out

"""The command nvfp4: what each sub-command prints and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make

pytest.importorskip("rich")

from nvfp4_moe import cli
from nvfp4_moe.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
PACKAGE = Path(cli.__file__).parents[1]  # the one under test, perhaps installed
COMMANDS = ("doctor", "inspect", "convert", "quantize", "layout", "bench")


def run(*args, **options):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "nvfp4_moe", *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def nvfp4(capsys):
    """nvfp4(arguments..) -> (exit code, stdout, stderr), in this process."""

    def call(*args):
        code = cli.main(list(map(str, args)))
        return code, *capsys.readouterr()

    return call


class TestHelp:
    def test_names_every_command(self):
        done = run("--help")
        assert done.returncode == 0 and all(f"\n    {c} " in done.stdout for c in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_has_examples_that_parse(self, command, capsys):
        with pytest.raises(SystemExit) as done:
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert done.value.code == 0
        examples = [line for line in text.splitlines() if line.startswith(f"  nvfp4 {command}")]
        assert len(examples) > 1
        for line in examples:
            words = line.split("|")[0].split("   ")[1 if line.startswith("   ") else 0].split()
            cli.parser().parse_args([w.strip("'") for w in words[1:]])

    def test_a_missing_or_unknown_command_is_an_error(self, capsys):
        for arguments in ([], ["convrt"]):
            with pytest.raises(SystemExit) as done:
                cli.main(arguments)
            assert done.value.code == 2 and "usage" in capsys.readouterr().err

    def test_is_installed_as_nvfp4(self):
        if sys.version_info < (3, 11):
            pytest.skip("tomllib is new in 3.11")
        import tomllib

        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        module, function = scripts["nvfp4"].split(":")
        assert getattr(sys.modules[module], function) is cli.main


class TestConvert:
    def test_converts_and_says_so(self, nvfp4, tmp_path):
        make(tmp_path / "source", "gpt-oss")
        code, out, err = nvfp4("convert", tmp_path / "source", tmp_path / "target")
        assert code == 0 and "24 of 24 matrices kept every bit" in out and "/s of input" in out
        assert "converting source" in err  # the bar
        assert open_checkpoint(tmp_path / "target").format.name == "modelopt-nvfp4"

    def test_dry_run_writes_nothing(self, nvfp4, tmp_path):
        make(tmp_path / "source", "gpt-oss")
        code, out, _ = nvfp4("convert", tmp_path / "source", tmp_path / "target", "--dry-run")
        assert code == 0 and not (tmp_path / "target").exists()
        assert "24 modules in NVFP4" in out and "exact by their exponents alone: 16 of 16" in out

    def test_options_reach_the_conversion(self, nvfp4, tmp_path):
        make(tmp_path / "source", "gpt-oss")
        options = ["--to", "compressed-tensors", "--method", "hybrid", "--activation-amax", 100]
        options += ["--shard-size", "50kB"]
        assert nvfp4("convert", tmp_path / "source", tmp_path / "t", *options)[0] == 0
        after = open_checkpoint(tmp_path / "t")
        assert after.format.name == "compressed-tensors-nvfp4" and len(after.shards.files) > 2
        report = json.loads((tmp_path / "t/nvfp4-conversion.json").read_text())
        assert report["options"]["method"] == "hybrid" and report["options"]["activation_amax"] == 100

    def test_names_what_changed(self, nvfp4, tmp_path):
        make(tmp_path / "source", "compressed-tensors-mxfp4")
        code, out, _ = nvfp4("convert", tmp_path / "source", tmp_path / "t", "--method", "requantize")
        assert code == 0 and "0 of 24 matrices kept every bit" in out
        assert "relative RMS error" in out and ".. 24 in all" in out

    @pytest.mark.parametrize("form, words", [("modelopt", "no MXFP4"), ("bf16", "nvfp4 quantize")])
    def test_a_refusal_is_one_line_on_stderr(self, form, words, nvfp4, tmp_path):
        make(tmp_path / "source", form)
        code, out, err = nvfp4("convert", tmp_path / "source", tmp_path / "target")
        assert code == 2 and not out and words in err and err.count("\n") == 1
        assert err.startswith("nvfp4 convert: ") and not (tmp_path / "target").exists()

    @pytest.mark.parametrize("size", ["0", "-1", "5XB", "GB", ""])
    def test_a_size_that_is_none_is_an_error(self, size, capsys):
        with pytest.raises(SystemExit):
            cli.main(["convert", "a", "b", f"--shard-size={size}"])
        assert "a size such as 5GB" in capsys.readouterr().err


class TestQuantize:
    def test_quantizes_and_says_so(self, nvfp4, tmp_path):
        make(tmp_path / "source", "bf16")
        code, out, _ = nvfp4("quantize", tmp_path / "source", tmp_path / "t", "--exclude", "*.down_proj")
        assert code == 0 and "16 matrices; mean relative RMS error 9." in out
        assert len(open_checkpoint(tmp_path / "t").modules) == 16

    def test_dry_run_lists_modules(self, nvfp4, tmp_path):
        make(tmp_path / "source", "bf16")
        code, out, _ = nvfp4(
            "quantize", tmp_path / "source", tmp_path / "t", "--layers", "linears", "--dry-run"
        )
        assert code == 0 and "32 modules in all" in out and not (tmp_path / "t").exists()

    def test_a_pattern_without_a_match_is_an_error(self, nvfp4, tmp_path):
        make(tmp_path / "source", "bf16")
        code, _, err = nvfp4("quantize", tmp_path / "source", tmp_path / "t", "--include", "nothing")
        assert code == 2 and "'nothing' matches no weight" in err


class TestInspect:
    @pytest.mark.parametrize("form", ["gpt-oss", "deepseek-v4", "modelopt", "bf16"])
    def test_says_what_a_checkpoint_is(self, form, nvfp4, tmp_path):
        make(tmp_path, form)
        code, out, _ = nvfp4("inspect", tmp_path)
        checkpoint = open_checkpoint(tmp_path)
        assert code == 0 and checkpoint.format.name in out and checkpoint.shards.config["model_type"] in out
        facts = json.loads(nvfp4("inspect", tmp_path, "--json")[1])
        assert facts["format"] == checkpoint.format.name and facts["tensors"] == len(checkpoint.shards)
        assert len(nvfp4("inspect", tmp_path, "--modules")[1].splitlines()) == len(checkpoint.modules)

    def test_a_folder_that_is_none_is_an_error(self, nvfp4, tmp_path):
        code, out, err = nvfp4("inspect", tmp_path / "nowhere")
        assert code == 2 and not out and "not a directory" in err


class TestDoctor:
    def test_a_clean_checkpoint_is_0_a_suspicious_one_1_a_broken_one_2(self, nvfp4, tmp_path):
        make(tmp_path / "clean", "modelopt")
        assert nvfp4("doctor", tmp_path / "clean")[0] == 0
        make(tmp_path / "stale", "modelopt", shards=2)
        index = tmp_path / "stale/model.safetensors.index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"total_size": 1}}))
        code, out, _ = nvfp4("doctor", tmp_path / "stale", "--json")
        assert code == json.loads(out)["exit_code"] == 1
        file = next((tmp_path / "clean").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-100])
        code, out, _ = nvfp4("doctor", tmp_path / "clean")
        assert code == 2 and "truncated" in out

    def test_the_bar_advances_by_what_is_new(self):
        seen = []
        progress = cli.doctor._advancing(lambda nbytes, total: seen.append((nbytes, total)))
        for now in (10, 30, 60):
            progress(now, 60)
        assert seen == [(10, 60), (20, 60), (30, 60)]

    def test_the_environment(self, nvfp4):
        code, out, _ = nvfp4("doctor", "--json")
        assert code in (0, 1) and torch.__version__ in out
        assert isinstance(json.loads(out), list)

    def test_writes_a_report(self, nvfp4, tmp_path):
        pytest.importorskip("matplotlib")
        make(tmp_path / "clean", "modelopt")
        html, png = tmp_path / "r.html", tmp_path / "r.png"
        assert nvfp4("doctor", tmp_path / "clean", "--html", html, "--png", png)[0] == 0
        assert html.read_text().startswith("<!doctype html>") and png.read_bytes()[:4] == b"\x89PNG"


class TestLayout:
    def test_places_of_scales_and_bytes(self, nvfp4):
        assert "byte 4113 (linear: 3617)" in nvfp4("layout", 300, 28, "--at", 129, 5)[1]
        assert "row 129, column 5" in nvfp4("layout", 300, 28, "--byte", 4113)[1]
        assert "padding" in nvfp4("layout", 130, 5, "--byte", 2 * 2 * 512 - 1)[1]

    def test_the_map_shows_padding_and_compares_with_cutlass(self, nvfp4):
        code, out, _ = nvfp4("layout", 40, 3)
        assert code == 0 and "size 120 bytes, cosize 512" in out and " 32:0 " in out and " . " in out
        assert "DIFFERS" not in out

    @pytest.mark.parametrize("arguments", [(0, 4), (4, 4, "--at", 4, 0), (4, 4, "--byte", 512)], ids=str)
    def test_what_is_outside_is_an_error(self, arguments):
        with pytest.raises(SystemExit, match="nvfp4 layout"):
            cli.main(["layout", *map(str, arguments)])


def test_bench_prints_a_line_for_each_size(nvfp4):
    sizes = ["--hidden", 128, "--intermediate", 64, "--experts", 4, "--top-k", 2, "--tokens", 1, 3]
    code, out, _ = nvfp4("bench", *sizes, "--device", "cpu", "--seconds", 0.01)
    assert code == 0 and [line.split()[:2] for line in out.splitlines()[2:]] == [
        ["1", "bf16"], ["1", "nvfp4"], ["3", "bf16"], ["3", "nvfp4"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--hidden", "100"], "must be a positive multiple of 16, got 100"),
        (["--top-k", "300"], "`top_k` must be in 1 .. E = 128, got 300"),
    ],
)
def test_bench_refuses_sizes_in_one_line(arguments, says):
    with pytest.raises(SystemExit, match=f"^nvfp4 bench: .*{says}"):
        cli.main(["bench", "--tokens", "1", "--device", "cpu", *arguments])


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "99999999999"])
def test_bench_wants_positive_numbers(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", f"--tokens={text}"])
    assert f"a positive number, got '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["convert", "quantize", "bench"])
def test_a_device_that_is_not_there_is_one_line(command, nvfp4, tmp_path):
    make(tmp_path / "source", "bf16" if command == "quantize" else "gpt-oss")
    where = [] if command == "bench" else [tmp_path / "source", tmp_path / "target"]
    code, out, err = nvfp4(command, *where, "--device", "cuda:99")
    assert (
        code == 2
        and not out
        and err.count("\n") == 1
        and err.startswith(f"nvfp4 {command}: device 'cuda:99'")
    )
    assert not (tmp_path / "target").exists()


def test_doctor_knows_before_it_reads_that_a_report_has_nowhere_to_go(nvfp4, tmp_path):
    make(tmp_path / "clean", "modelopt")
    for option in ("--html", "--png"):
        code, out, err = nvfp4("doctor", tmp_path / "clean", option, tmp_path / "none/x")
        assert code == 2 and not out and f"there is no folder {tmp_path}/none" in err and "reading" not in err


def test_inspect_counts_what_is_there(nvfp4, tmp_path):
    make(tmp_path, "gpt-oss")
    facts = json.loads(nvfp4("inspect", tmp_path, "--json")[1])
    assert facts["weights"] == f"{2 * 4 * 3 * 64 * 96:,} in 4 bits"
    assert (
        facts["by_type"]["U8"] == "78.3 kB"
        and facts["MoE_layers"] == "2: model.layers.0.mlp .. model.layers.1.mlp"
    )


def test_a_closed_pipe_is_no_traceback(tmp_path):
    """As of `nvfp4 inspect .. | head`, once head has gone."""
    make(tmp_path, "modelopt")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nvfp4_moe", "inspect", str(tmp_path), "--modules"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert done.returncode == 0 and not done.stderr

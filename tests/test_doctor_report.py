"""Reports: what is drawn and written, also where names are hostile or matplotlib is missing."""

import io
import json
import re
import sys

import checkpoints
import pytest
import torch

from nvfp4_moe.cli import main
from nvfp4_moe.diagnostics import Finding, Place, Report, check_checkpoint, environment

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    truth = checkpoints.make(path, "deepseek-v4-nvfp4", mismatched=True)
    name = "layers.0.ffn.experts.1.w2.weight_scale"
    truth.tensors[name].view(torch.uint8)[0, 0] = 0x7F
    checkpoints.write_directory(path, truth.tensors, truth.config)
    return check_checkpoint(path)


def test_every_distribution_is_there(report):
    titles = [h.title for h in report.histograms]
    for wanted in (
        "Block scales",
        "Global scales",
        "gate's",
        "folded",
        "exponent spread",
        "Codes",
        "exponents",
    ):
        assert any(wanted in title for title in titles), (wanted, titles)
    ratios = next(h for h in report.histograms if "gate's" in h.title)
    assert sum(ratios.counts) == 8  # 2 layers of 4 experts
    assert ratios.note == "0 of 8 pairs are equal"


def test_the_html_stands_alone(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.write_html(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "layers.0.ffn.experts.1.w2.weight_scale" in html and "the first at [0, 0]" in html
    assert html.count("data:image/png;base64,") == 1 and "<script" not in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    for check in report.checks:
        assert check in html


def test_the_png_is_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.write_png(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)


def test_names_are_data_and_never_markup(tmp_path):
    text = pytest.importorskip("nvfp4_moe.diagnostics.text")
    evil = "<img src=x onerror=alert(1)>[bold]x[/]"
    places = tuple(Place(f"{evil}{i}", evil) for i in range(300))
    hostile = Report(
        evil, evil, {evil: evil}, [Finding("index", "error", "a title", "advice", "fault", places)]
    )
    hostile.write_html(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in html and "&lt;img src=x" in html and "and 100 more" in html
    out = io.StringIO()
    text.print_report(hostile, text.Console(file=out, width=200))
    assert "[bold]x[/]0" in out.getvalue() and "and 296 more" in out.getvalue()


def test_a_terminal_shows_what_was_found(report):
    text = pytest.importorskip("nvfp4_moe.diagnostics.text")
    out = io.StringIO()
    console = text.Console(file=out, width=300)
    text.print_report(report, console)
    text.print_environment(environment(), console)
    shown = out.getvalue()
    assert "error" in shown and "layers.0.ffn.experts.1.w2.weight_scale: 1 of " in shown
    assert re.search(r"21 checks: \d+ without a finding", shown)
    assert "moe on cpu: the reference's result" in shown


def test_without_matplotlib_a_report_says_what_to_install(report, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"nvfp4-moe\[plot\]"):
        report.write_png(tmp_path / "report.png")


def test_a_report_without_histograms_needs_no_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    check_checkpoint(tmp_path / "nowhere").write_html(tmp_path / "report.html")
    assert "cannot be read" in (tmp_path / "report.html").read_text()


def test_the_command_line_reads_measured_activations(tmp_path, capsys):
    checkpoints.make(tmp_path / "model", "modelopt")
    (tmp_path / "amax.json").write_text(json.dumps({"model.layers.0.mlp.experts.1.down_proj": 3.0 * 1.7}))
    command = ["doctor", str(tmp_path / "model"), "--activations", str(tmp_path / "amax.json"), "--json"]
    assert main(command) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["checks"]["activations"] == "warning" and found["exit_code"] == 1
    assert main(["doctor", str(tmp_path / "model")]) == 0
    for wrong in ("{", "[1]", '{"a": "b"}'):
        (tmp_path / "amax.json").write_text(wrong)
        assert main(command) == 2
        assert "amax.json" in capsys.readouterr().err


def test_the_command_line_misses_matplotlib_before_it_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    checkpoints.make(tmp_path / "model", "modelopt")
    assert main(["doctor", str(tmp_path / "model"), "--html", str(tmp_path / "x.html")]) == 2
    assert "nvfp4-moe[plot]" in capsys.readouterr().err

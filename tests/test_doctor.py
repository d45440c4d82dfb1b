"""The doctor finds every fault it knows, names the place, and says nothing about checkpoints without one."""

import json
import re
from pathlib import Path

import checkpoints
import doctor_file_faults  # noqa: F401  its plants
import pytest
import torch
from doctor_faults import PLANTS

from nvfp4_moe.checkpoint import Shards
from nvfp4_moe.diagnostics import CHECKS, FAULTS, ActivationProbe, check_checkpoint, units
from nvfp4_moe.diagnostics.finding import EXIT_CODE, INFO

# facts of the tiny checkpoints that are worth a line of information and no more
KNOWN = {"input-scale-same", "config-ignore"}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: f"{p.fault}-{p.form}")
def test_every_planted_fault_is_found_and_nothing_else(plant, tmp_path):
    plant.make(tmp_path)
    report = check_checkpoint(tmp_path, **plant.options)
    found = {finding.fault: finding for finding in report.findings}
    assert plant.fault in found, [f"{f.fault}: {f.places[0]}" for f in report.findings]
    finding = found[plant.fault]
    wanted = str(tmp_path) if plant.place == "{path}" else plant.place
    assert wanted in finding.places[0].name, finding.places
    assert plant.says in finding.places[0].detail
    assert (finding.check, finding.severity) == (FAULTS[plant.fault].check, FAULTS[plant.fault].severity)
    assert set(found) - KNOWN - plant.also <= {plant.fault}, [f"{f}: {found[f].places[0]}" for f in found]
    assert report.exit_code == max(EXIT_CODE[f.severity] for f in report.findings)
    assert report.checks[finding.check] in (finding.severity, "error")


def test_every_fault_has_a_plant_and_every_check_a_fault():
    assert {plant.fault for plant in PLANTS} == set(FAULTS)
    assert {fault.check for fault in FAULTS.values()} == set(CHECKS)
    assert len(CHECKS) == 21


@pytest.mark.parametrize("form", checkpoints.FORMS)
@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_said_about_a_clean_checkpoint(form, seed, tmp_path):
    checkpoints.make(tmp_path, form, shards=1 + seed, seed=seed)
    report = check_checkpoint(tmp_path)
    assert {f.fault for f in report.findings} <= KNOWN, [f"{f.fault}: {f.places[0]}" for f in report.findings]
    assert all(f.severity == INFO for f in report.findings)
    assert report.exit_code == 0


def test_what_no_group_targets_need_not_be_quantized(tmp_path):
    truth = checkpoints.make(tmp_path, "compressed-tensors-nvfp4")
    said = truth.config["quantization_config"]
    group = said["config_groups"]["group_0"]
    for targets, faults in (
        ([r"re:.*\.experts\."], set()),
        ([r"re:.*\.experts\.", "*.q_proj"], {"not-quantized"}),
    ):
        groups = {"group_0": {**group, "targets": targets}}
        config = {**truth.config, "quantization_config": {**said, "config_groups": groups, "ignore": []}}
        checkpoints.write_directory(tmp_path, truth.tensors, config)
        report = check_checkpoint(tmp_path)
        assert {f.fault for f in report.findings} - KNOWN == faults
        places = [p.name for f in report.findings if f.fault == "not-quantized" for p in f.places]
        assert all(name.endswith("q_proj") for name in places) and len(places) == 2 * len(faults)


def test_a_missing_directory_is_a_finding(tmp_path):
    report = check_checkpoint(tmp_path / "nowhere")
    assert [f.fault for f in report.findings] == ["unreadable"] and report.exit_code == 2


def test_findings_stand_errors_first_and_the_worst_place_first(tmp_path):
    by_fault = {plant.fault: plant for plant in PLANTS if plant.form == "modelopt" and not plant.on_disk}

    def several(t, config):
        for fault in ("saturated", "nan-scale", "config-ignore"):
            by_fault[fault].damage(t, config)
        t["model.layers.1.mlp.experts.0.up_proj.weight_scale_2"] *= 1.01
        t["model.layers.1.mlp.experts.3.up_proj.weight_scale_2"] *= 1.2

    plant = by_fault["nan-scale"]
    type(plant)("", "modelopt", "", several).make(tmp_path)
    report = check_checkpoint(tmp_path)
    severities = [f.severity for f in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index) and len(severities) >= 4
    pair = next(f for f in report.findings if f.fault == "gate-up-differ")
    assert [".3." in p.name for p in pair.places] == [True, False] and "16.7%" in pair.places[0].detail


def test_the_json_names_every_place(tmp_path):
    truth = checkpoints.make(tmp_path, "modelopt")
    scales = [name for name in truth.tensors if name.endswith("weight_scale")]
    for name in scales:
        truth.tensors[name] = -truth.tensors[name].float()
        truth.tensors[name] = truth.tensors[name].to(torch.float8_e4m3fn)
    checkpoints.write_directory(tmp_path, truth.tensors, truth.config)
    report = json.loads(check_checkpoint(tmp_path).to_json())
    negative = next(f for f in report["findings"] if f["fault"] == "negative-scale")
    assert sorted(place["name"] for place in negative["places"]) == sorted(scales) and len(scales) == 24
    assert report["exit_code"] == 2 and report["format"] == "modelopt-nvfp4"
    assert set(report["checks"]) == set(CHECKS)


def test_progress_counts_every_byte_once(tmp_path):
    checkpoints.make(tmp_path, "modelopt")
    seen = []
    check_checkpoint(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 24 and seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("form", ["modelopt", "gpt-oss", "modelopt-llama4"])
def test_a_matrix_at_a_time(form, tmp_path, monkeypatch):
    """Mapped pages are let go again and again, and no more than an expert's matrix is looked at."""
    checkpoints.make(tmp_path, form)
    released, largest = [], []
    table = units.block_table
    monkeypatch.setattr(units, "RELEASE", 4096)
    monkeypatch.setattr(Shards, "release", lambda self: released.append(self))
    monkeypatch.setattr(units, "block_table", lambda p, s: largest.append(p.numel()) or table(p, s))
    assert check_checkpoint(tmp_path).exit_code == 0
    experts, rows, columns = 4, 192, 64
    assert len(largest) >= 2 * experts and max(largest) <= rows * columns // 2
    assert len(released) >= len(largest) // 4


def test_a_probe_measures_what_the_check_wants(tmp_path):
    checkpoints.make(tmp_path, "modelopt")
    name = "model.layers.0.mlp.experts.1.down_proj"  # calibrated to an amax of 3
    model = inner = torch.nn.Module()
    for part in name.split(".")[:-1]:
        inner.add_module(part, torch.nn.Module())
        inner = getattr(inner, part)
    inner.down_proj = torch.nn.Linear(96, 64)
    with ActivationProbe(model) as probe:
        inner.down_proj(torch.full((2, 96), -7.5))
        inner.down_proj(torch.ones(2, 96))
    inner.down_proj(torch.full((1, 96), 100.0))  # the probe is off again
    assert probe.amax == {name: 7.5}
    report = check_checkpoint(tmp_path, activations=probe.amax)
    assert [f.fault for f in report.findings if f.severity == "error"] == ["activation-far-above"]
    assert "2.50 times" in report.findings[0].places[0].detail


def test_the_manual_names_every_check():
    manual = (Path(__file__).parents[1] / "docs/doctor.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([\w-]+)` \|", manual, re.M)
    assert [(int(number), name) for number, name in rows] == list(enumerate(CHECKS, 1))
    for finding in re.findall(r"^(?:error|warning|info) +(?! |CUDA)(.+)$", manual, re.M):
        assert finding in {fault.title for fault in FAULTS.values()}, finding

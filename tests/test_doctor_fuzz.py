"""Whatever a checkpoint holds, the doctor reports and does not fall over."""

import json

import checkpoints
import pytest
import torch

from nvfp4_moe.diagnostics import check_checkpoint
from nvfp4_moe.diagnostics.finding import SEVERITIES

FORMS = [
    "modelopt",
    "modelopt-gpt-oss",
    "compressed-tensors-nvfp4",
    "gpt-oss",
    "deepseek-v4",
    "deepseek-v4-nvfp4",
]
ODD = (None, 3, "x", [], [1, None], {}, {"a": {"b": 0}}, True, 1e9, float("inf"))


def mutate_tensor(t: dict, name: str, how: int) -> None:
    value = t[name]
    raw = value.contiguous().view(-1).view(torch.uint8) if value.numel() else value
    if how == 0:
        del t[name]
    elif how == 1:
        raw.random_(0, 256)
    elif how == 2:
        t[name] = value.unsqueeze(0)
    elif how == 3:
        t[name] = raw[:1].clone() if raw.numel() else torch.zeros(3)
    elif how == 4:
        t[name] = torch.zeros(value.shape, dtype=torch.float16)
    elif how == 5:
        t[name] = torch.zeros((0, *value.shape), dtype=value.dtype)
    elif how == 6:
        t[name] = torch.zeros(7, 5, 3)
    elif how == 7:
        t[name + ".weight_scale"] = torch.zeros(2, 2).to(torch.float8_e4m3fn)
    elif how == 8:
        raw.fill_(0xFF)
    else:
        raw.zero_()


def mutate_json(value, rng) -> None:
    """One value somewhere in it becomes something else."""
    while isinstance(value, dict) and value:
        key = list(value)[int(torch.randint(len(value), (), generator=rng))]
        if isinstance(value[key], dict) and value[key] and torch.rand((), generator=rng) < 0.8:
            value = value[key]
            continue
        value[key] = ODD[int(torch.randint(len(ODD), (), generator=rng))]
        return


@pytest.mark.parametrize("form", FORMS)
def test_damaged_checkpoints_are_reported(form, tmp_path):
    truth = checkpoints.make(tmp_path, form)
    rng = torch.Generator().manual_seed(FORMS.index(form))
    found = set()
    for _ in range(40):
        t = {name: tensor.clone() for name, tensor in truth.tensors.items()}
        config = json.loads(json.dumps(truth.config))
        for _ in range(1 + int(torch.randint(3, (), generator=rng))):
            names = [n for n in t if ".experts." in n] if torch.rand((), generator=rng) < 0.8 else list(t)
            name = names[int(torch.randint(len(names), (), generator=rng))]
            mutate_tensor(t, name, int(torch.randint(10, (), generator=rng)))
        if torch.rand((), generator=rng) < 0.5:
            mutate_json(config, rng)
        checkpoints.write_directory(tmp_path, t, config)
        report = check_checkpoint(tmp_path)
        json.loads(report.to_json())
        assert all(f.severity in SEVERITIES and f.places for f in report.findings)
        found |= {f.fault for f in report.findings}
    assert len(found) >= 4, found

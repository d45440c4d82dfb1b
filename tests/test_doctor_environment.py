"""nvfp4 doctor without a checkpoint: every row can turn red, and on a sound machine none does."""

import json
import struct
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from nvfp4_moe import ops, reference
from nvfp4_moe.diagnostics import environment as rows_of
from nvfp4_moe.diagnostics import exit_code
from nvfp4_moe.diagnostics.libraries import architectures

# by its path: the package has a function of that name
environment = import_module("nvfp4_moe.diagnostics.environment")


def rows(check, severity=None):
    return [f for f in rows_of() if f.check == check and severity in (None, f.severity)]


def test_a_sound_machine_passes_with_every_operator_on_every_device():
    found = rows_of()
    assert exit_code(found) == 0, [f for f in found if f.severity in ("warning", "error")]
    operators = [f.title.split(" on ")[0] for f in found if f.check == "operator" and " on cpu" in f.title]
    assert operators == reference.__all__ and len(operators) == 17
    assert {f.check for f in found} >= {"torch", "library", "plan", "operator"}
    json.dumps([f.to_dict() for f in found])


@pytest.mark.parametrize("name", reference.__all__)
def test_an_operator_that_computes_something_else_is_found(name, monkeypatch):
    true = getattr(ops, name)

    def wrong(*operands):
        out = true(*operands)
        first = (out if isinstance(out, torch.Tensor) else out[0]).clone()
        if first.dtype == torch.bfloat16:
            first.view(-1)[: first.numel() // 4] = 0  # a quarter of a sum is lost
        else:
            first.view(-1).view(torch.uint8)[-1] ^= 1  # one bit
        return first if isinstance(out, torch.Tensor) else (first, *out[1:])

    monkeypatch.setattr(ops, name, wrong)
    bad = [f for f in rows("operator", "error") if " on cpu" in f.title]
    assert [f.title.split(" on ")[0] for f in bad] == [name]
    assert exit_code(bad) == 2


def test_an_operator_that_raises_is_found(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image\nlong story")

    monkeypatch.setattr(ops, "linear", broken)
    (bad,) = [f for f in rows("operator", "error") if " on cpu" in f.title]
    assert bad.title == "linear on cpu: RuntimeError: no kernel image"


def test_an_old_torch_is_an_error(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    (row,) = rows("torch")
    assert row.severity == "error" and "2.11" in row.advice


def test_a_torch_without_cuda_beside_a_gpu_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(environment, "nvidia_smi", lambda: ["NVIDIA H200, 9.0, 580.1"])
    (row,) = rows("CUDA")
    assert row.severity == "warning" and "H200" in row.title and "install" in row.advice


def test_a_driver_that_does_not_fit_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment, "nvidia_smi", lambda: ["NVIDIA H200, 9.0, 470.1"])
    (row,) = rows("GPU")
    assert row.severity == "warning" and "driver" in row.advice
    monkeypatch.setattr(environment, "nvidia_smi", list)
    (row,) = rows("GPU")
    assert row.severity == "info"


GPU = SimpleNamespace(name="NVIDIA Test", major=9, minor=0, total_memory=140 << 30)


@pytest.mark.parametrize(
    "libraries, major, minor, severity, says",
    [
        ({"libnvfp4": [80, 90], "libnvfp4_sm90": [90]}, 9, 0, "ok", "sm90's own kernels"),
        ({"libnvfp4": [80, 90]}, 9, 0, "ok", "none of its own"),
        ({"libnvfp4": [80]}, 8, 9, "ok", "none of its own"),
        ({"libnvfp4": [100]}, 10, 3, "ok", "none of its own"),
        ({"libnvfp4": [90]}, 10, 0, "error", "NVFP4_CHIPS=sm100"),
        ({"libnvfp4": [103]}, 10, 0, "error", "NVFP4_CHIPS=sm100"),
        ({"libnvfp4": []}, 9, 0, "error", "NVFP4_CHIPS=sm90"),
        ({"libnvfp4": [80]}, 7, 5, "error", "sm_80 or later"),
    ],
)
def test_a_gpu_without_kernels_is_an_error(libraries, major, minor, severity, says, monkeypatch, tmp_path):
    paths = {tmp_path / f"{name}.so": archs for name, archs in libraries.items()}
    device = SimpleNamespace(**{**vars(GPU), "major": major, "minor": minor})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(environment, "loaded_libraries", lambda: sorted(paths))
    monkeypatch.setattr(environment, "architectures", paths.get)
    (row,) = list(environment._gpus())
    assert row.severity == severity and says in row.title + row.advice
    assert "cuda:0 NVIDIA Test" in row.title and "140 GiB" in row.title


def test_a_chip_library_that_was_not_loaded_is_an_error(monkeypatch, tmp_path):
    core = tmp_path / "libnvfp4.so"
    core.write_bytes(b"\x7fELF" + bytes(100))
    (tmp_path / "libnvfp4_sm90.so").write_bytes(b"\x7fELF" + bytes(100))
    monkeypatch.setattr(environment, "loaded_libraries", lambda: [core])
    loaded, missed = environment._libraries()
    assert loaded.severity == "ok" and "CPU alone" in loaded.title
    assert missed.severity == "error" and "libnvfp4_sm90.so" in missed.title


def fat_binary(*entries):
    """(kind, architecture, bytes of code) as nvcc embeds them."""
    body = b"".join(
        struct.pack("<HHIQ12xI", kind, 0x101, 64, size, arch).ljust(64, b"\0") + b"\xaa" * size
        for kind, arch, size in entries
    )
    return struct.pack("<4sHHQ", b"\x50\xed\x55\xba", 1, 16, len(body)) + body


@pytest.mark.parametrize(
    "content, archs",
    [
        (fat_binary((2, 90, 100), (2, 80, 40)) + b"between" + fat_binary((2, 100, 8)), [80, 90, 100]),
        (fat_binary((1, 90, 100)), []),  # PTX is no machine code
        (fat_binary((2, 90, 1000), (2, 80, 8))[:90], [90]),  # truncated
        (b"\x50\xed\x55\xba", []),
        (b"\x50\xed\x55\xba" + b"\xff" * 64, []),
        (b"no GPU code", []),
    ],
)
def test_architectures_are_read_off_the_file(content, archs, tmp_path):
    file = tmp_path / "lib.so"
    file.write_bytes(b"\x7fELF" + bytes(13) + content)
    assert architectures(file) == archs


def test_the_loaded_library_serves_the_device_it_runs_on():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    major = torch.cuda.get_device_capability()[0]
    assert any(a // 10 == major for path in environment.loaded_libraries() for a in architectures(path))

"""A chip library brings its kernels by registering with the core when it is loaded."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import nvfp4_moe

ROOT = Path(__file__).resolve().parents[1]
SOURCE = """
#include "chip.h"
static void gemm(const nvfp4::GemmParams&, void*, cudaStream_t) {}
static bool takes(const nvfp4::GemmParams&) { return true; }
static int64_t workspace(const nvfp4::GemmParams&) { return 0; }
static std::string plan(int64_t, int64_t, int64_t, int64_t, bool) { return "sm77"; }
static const nvfp4::Chip chip = {"sm77", 7, takes, workspace, gemm, plan};
static const bool registered = (nvfp4_register_chip(&chip), true);
"""


def test_a_loaded_chip_library_serves_its_generation(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    core = Path(nvfp4_moe._library).resolve()
    (tmp_path / "chip.cpp").write_text(SOURCE)
    library = tmp_path / "libnvfp4_sm77.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{ROOT / 'csrc/kernels'}"]
    subprocess.run([*command, tmp_path / "chip.cpp", core, "-o", library], check=True)

    chip_for = ctypes.CDLL(str(core)).nvfp4_chip_for
    chip_for.restype = ctypes.c_void_p
    assert chip_for(7) is None and chip_for(77) is None
    ctypes.CDLL(str(library))
    name = ctypes.cast(chip_for(7), ctypes.POINTER(ctypes.c_char_p))[0]
    assert name == b"sm77" and chip_for(6) is None


def test_every_chip_library_beside_the_core_has_registered():
    core = Path(nvfp4_moe._library).resolve()
    chip_for = ctypes.CDLL(str(core)).nvfp4_chip_for
    chip_for.restype = ctypes.c_void_p
    for library in core.parent.glob("libnvfp4_sm*.so"):
        chip = library.stem.removeprefix("libnvfp4_")
        name = ctypes.cast(chip_for(int(chip[2:-1])), ctypes.POINTER(ctypes.c_char_p))[0]
        assert name == chip.encode()

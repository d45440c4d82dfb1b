"""csrc/kernels/{formats,math}.h, compiled for the host alone, against torch and the Python definitions."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits

from nvfp4_moe import formats
from nvfp4_moe.reference import numbers

SOURCE = Path(__file__).parent / "cpp/formats.cpp"
BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """call(name, x, dtype): the header's function over an array."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("cpp") / "formats.so"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, SOURCE, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))

    def call(name, x, dtype):
        y = torch.empty(x.shape, dtype=dtype)
        getattr(functions, name)(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel())
        )
        return y

    call.functions = functions
    return call


def floats() -> torch.Tensor:
    """Every upper half of a float32 with three lower halves (ties and both sides), and random bits."""
    high = torch.arange(2**16, dtype=torch.int64) << 16
    bits = torch.cat([high + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    random = torch.randint(0, 2**32, (300000,), dtype=torch.int64)
    return torch.cat([bits, random]).to(torch.int32).view(torch.float32)


def test_decodes_every_byte(header):
    assert_same_bits(header("e2m1_decode", BYTES, torch.float32), formats.e2m1_decode(BYTES % 16))
    assert_same_bits(header("e4m3_decode", BYTES, torch.float32), BYTES.view(torch.float8_e4m3fn).float())
    assert_same_bits(header("e8m0_decode", BYTES, torch.float32), formats.e8m0_decode(BYTES))


def test_encodes_e2m1_as_python_does(header):
    x = floats()
    assert_same_bits(header("e2m1_encode", x, torch.uint8), formats.e2m1_encode(x))


def test_encodes_e4m3_as_torch_does(header):
    x = floats()
    nan = x.isnan()
    got = header("e4m3_encode", x, torch.uint8)
    assert_same_bits(got[~nan], formats.e4m3_encode(x[~nan]).view(torch.uint8))
    assert bool((got[nan] & 0x7F == 0x7F).all())


def test_encodes_e8m0_as_torch_does(header):
    x = floats()
    assert_same_bits(header("e8m0_encode", x, torch.uint8), formats.e8m0_encode(x))


def test_converts_bf16_and_fp16_as_torch_does(header):
    x = floats()
    for name, dtype in (("to_bf16", torch.bfloat16), ("to_f16", torch.float16)):
        assert_same_bits(header(name, x, torch.int16).view(dtype), x.to(dtype), name)
    half = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    assert_same_bits(header("from_f16", half, torch.float32), half.view(torch.float16).float())


@pytest.mark.parametrize(
    "name, definition",
    [
        ("exp32", numbers.exp),
        ("sigmoid32", numbers.sigmoid),
        ("softplus32", numbers.softplus),
        ("swish32", lambda x: numbers.swish(x, 1.702)),
    ],
)
def test_own_functions_have_the_reference_bits(header, name, definition):
    x = torch.cat([floats(), torch.linspace(-110, 95, 200001)])
    assert_same_bits(header(name, x, torch.float32), definition(x), name)


def test_row_scale_is_the_smallest_power_of_two_that_reaches(header):
    amax = floats().abs()
    amax = amax[amax.isfinite()]
    got = header("row_scale", amax, torch.float32)
    assert_same_bits(got, numbers.row_scale(amax))
    some = amax >= 2.0**-114  # above the clamp at 2^-126
    assert bool((got[some].double() * 2688 >= amax[some]).all())
    assert bool((got[some].double() / 2 * 2688 < amax[some]).all())


def test_sf_offset_is_pythons(header):
    cols = 13
    rc = torch.cartesian_prod(torch.arange(700), torch.arange(cols))
    got = torch.empty(len(rc), dtype=torch.int64)
    header.functions.sf_offset(
        *map(ctypes.c_void_p, (rc.data_ptr(), got.data_ptr())), *map(ctypes.c_int64, (len(rc), cols))
    )
    assert torch.equal(got, formats.sf_offset(rc[:, 0], rc[:, 1], cols))

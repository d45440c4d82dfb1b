import importlib.util
import os
import shutil

import pytest
import torch
from checkpoints import make

import nvfp4_moe  # noqa: F401  loads the operators


def missing_gpu() -> str | None:
    """Why nothing runs on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.ops.nvfp4.tensor_scale(torch.ones(1, device="cuda"))
    except RuntimeError as error:
        return str(error)
    return None


def missing_hopper() -> str | None:
    """Why the Hopper kernels cannot run here, or None."""
    if why := missing_gpu():
        return why
    plan = torch.ops.nvfp4.gemm_plan(1, 128, 128, 1, "bf16")
    return None if plan.startswith("sm90") else f"no sm_90 device or no libnvfp4_sm90: would run {plan}"


def missing_triton() -> str | None:
    """Why no Triton kernel runs here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    compilers = (os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))
    return None if any(compilers) else "no C compiler, with which triton builds what launches a kernel"


def devices() -> list:
    """Where test bodies run: the CPU, and the GPU where there is one; a missing GPU shows as skips with the
    reason."""
    why = missing_gpu()
    skip = pytest.mark.skipif(why is not None, reason=str(why))
    return ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, skip])]


@pytest.fixture(params=devices(), scope="session")
def device(request) -> str:
    return request.param


def pytest_collection_modifyitems(items):
    share, shares = map(int, os.environ.get("NVFP4_SHARE", "0/1").split("/"))  # sanitize_tests.py
    items[:] = items[share::shares]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20261121)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(form): a checkpoint on the disk, in three shards, made once; gate and up have their own scales."""
    made = {}

    def get(form: str):
        if form not in made:
            path = tmp_path_factory.mktemp(form)
            made[form] = make(path, form, shards=3, mismatched="v4" not in form)
        return made[form]

    return get

"""NVFP4 Mixture-of-Experts for PyTorch: `torch.ops.nvfp4.*` and thin layers above them."""

import ctypes
import os
from pathlib import Path

import torch

_library = Path(os.environ.get("NVFP4_LIBRARY") or Path(__file__).with_name("libnvfp4.so"))
if not _library.exists():
    raise ImportError(
        f"nvfp4_moe: {_library} is missing. Build it with `make` or `pip install .` in a checkout."
    )
torch.ops.load_library(_library)
# a chip library registers its kernels with the core, whose symbols it has to see
ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)
for _chip in sorted(_library.parent.glob("libnvfp4_sm*.so")):
    torch.ops.load_library(_chip)

from . import ops  # noqa: E402
from .layers import Nvfp4GroupedLinear, Nvfp4Linear, Nvfp4MoE, Router, SharedExpert  # noqa: E402
from .tensor import Nvfp4Tensor  # noqa: E402

__all__ = ["Nvfp4GroupedLinear", "Nvfp4Linear", "Nvfp4MoE", "Nvfp4Tensor", "Router", "SharedExpert", "ops"]
__version__ = "0.1.0"

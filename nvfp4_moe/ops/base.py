"""What the operators' wrappers and fakes share."""

import torch
from torch import Tensor, library

from ..formats import BLOCK

U8, F8, F32, BF16, I32 = (torch.uint8, torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.int32)
COMPUTES = ("nvfp4", "bf16")
ACTS = ("silu", "swiglu_limit", "swiglu_oai", "relu2")
SCORES = ("softmax", "sigmoid", "sqrt_softplus")
MXFP4_METHODS = ("best", "requantize", "verbatim_midpoint", "verbatim_search", "hybrid")

nvfp4 = torch.ops.nvfp4


def fake(function):
    """Register `function`, named after its operator, as the fake, and refuse autograd for that operator."""
    name = "nvfp4::" + function.__name__.removeprefix("_fake_")

    def refuse(*args, **kwargs):
        raise RuntimeError(
            f"{name} is for inference only: call it under torch.no_grad() or torch.inference_mode()"
        )

    library.register_fake(name, function)
    library.register_autograd(name, refuse, setup_context=refuse)
    return function


def quantized(x: Tensor, lead, K: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((*lead, K // 2), dtype=U8), x.new_empty((*lead, K // BLOCK), dtype=F8)

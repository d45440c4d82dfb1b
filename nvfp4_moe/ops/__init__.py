"""torch.ops.nvfp4.*: a typed wrapper and, beside it, the fake that torch.compile and meta tensors use.

What each operator computes: nvfp4_moe/reference. Shapes: T tokens, k experts a token, R rows, E experts, S =
K/16. The operators are for inference: an input that requires grad under grad mode is an error."""

from .base import ACTS, COMPUTES, MXFP4_METHODS, SCORES
from .gemm import gemm_plan, grouped_gemm, linear
from .layouts import pack_sm90, remap_sf, unmap_sf, unpack_sm90
from .moe import combine, moe, permute, route, swiglu, swiglu_quantize
from .quantize import dequantize, mxfp4_to_nvfp4, quantize, quantize_rows, tensor_scale

__all__ = [
    "ACTS",
    "COMPUTES",
    "MXFP4_METHODS",
    "SCORES",
    "combine",
    "dequantize",
    "gemm_plan",
    "grouped_gemm",
    "linear",
    "moe",
    "mxfp4_to_nvfp4",
    "pack_sm90",
    "permute",
    "quantize",
    "quantize_rows",
    "remap_sf",
    "route",
    "swiglu",
    "swiglu_quantize",
    "tensor_scale",
    "unmap_sf",
    "unpack_sm90",
]

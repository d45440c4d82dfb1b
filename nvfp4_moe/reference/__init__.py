"""The definition of every operator, in plain torch, written to be read. Backends are tested against it.

numbers: fma, exp and the scale rules · quantize · pack · gemm · moe · mxfp4. Slow, CPU only; it
never calls an op.
"""

from .gemm import grouped_gemm, linear
from .moe import combine, moe, permute, route, swiglu, swiglu_quantize
from .mxfp4 import mxfp4_to_nvfp4
from .pack import pack_sm90, unpack_sm90
from .quantize import dequantize, quantize, quantize_rows, remap_sf, tensor_scale, unmap_sf

__all__ = [
    "combine",
    "dequantize",
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

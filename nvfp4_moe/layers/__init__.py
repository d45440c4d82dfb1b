"""nn.Modules that hold tensors and call ops; they know no chip."""

from .linear import Nvfp4GroupedLinear, Nvfp4Linear
from .moe import Nvfp4MoE, SharedExpert
from .router import Router

__all__ = ["Nvfp4GroupedLinear", "Nvfp4Linear", "Nvfp4MoE", "Router", "SharedExpert"]

"""Checkpoints: read every FP4 format in the wild, write ModelOpt's and compressed-tensors' NVFP4."""

from .dialects import Module
from .header import CheckpointError, TensorInfo
from .moe import MoeWeights
from .reader import Checkpoint, Format, open_checkpoint
from .shards import Shards
from .writer import ShardWriter

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Format",
    "Module",
    "MoeWeights",
    "ShardWriter",
    "Shards",
    "TensorInfo",
    "open_checkpoint",
]

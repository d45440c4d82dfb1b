"""Models -> shapes. hidden, intermediate, experts on this device, experts a token goes to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


MODELS = (
    Model("dsv4-pro-ep8", 7168, 3072, 48, 6),  # 384 experts over 8 devices; all of a token's six are local
    Model("qwen3-30b-a3b", 2048, 768, 128, 8),
    Model("gpt-oss-120b", 2880, 2880, 128, 4),
    Model("mixtral-8x7b", 4096, 14336, 8, 2),
)

GEMM_SHAPES = ((4096, 4096), (2048, 7168))  # N, K
GEMM_ROWS = (1, 2, 4, 8, 16, 64, 256, 512)

# The layer's tokens: decode, then the steps to prefill
MOE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)

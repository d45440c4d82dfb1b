"""vLLM's Marlin: its compiled library, driven as vllm's fused_marlin_moe drives it.

Wanted: an installed vllm wheel (0.33), or a folder on the path with vllm/_moe_C_stable_libtorch.abi3.so
alone: vllm is not imported. SwiGLU is ours (vLLM's sits in another library; the bytes moved are the same).
The wheel's Marlin is PTX for sm_80, so the driver compiles it at the first call, about 20 s."""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from moe_layer import Layer, Tokens
from torch import Tensor
from torch.nn.functional import pad

from nvfp4_moe import Nvfp4Tensor, ops

E2M1 = 562949953487106  # vllm::kFE2M1f.id()
BLOCKS_PER_SM = 4  # most CTAs an SM, for the locks


@functools.cache
def operators(name: str = "_moe_C"):
    """torch.ops._moe_C, or another of vLLM's; ImportError says why not."""
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [f for folder in folders for f in sorted(Path(folder).glob(f"{name}*.so"))]
    if not files:
        raise ImportError(f"no vllm/{name}*.so on the path")
    # it takes torch's symbols from the process, which Python loads for torch alone
    for needed in ("libtorch_cpu.so", "libtorch_cuda.so"):
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / needed), ctypes.RTLD_GLOBAL)
    torch.ops.load_library(files[0])
    return getattr(torch.ops, name)


def align(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers sorted by expert and padded to blocks, each block's expert, how many there are."""
    most = ids.numel() + experts * (block - 1)
    if ids.numel() < experts:
        most = min(ids.numel() * block, most)
    sorted_ids = ids.new_empty(most)
    expert_ids = ids.new_empty(-(-most // block))
    count = ids.new_empty(1)
    operators().moe_align_block_size(ids, experts, block, sorted_ids, expert_ids, count, None, None)
    return sorted_ids, expert_ids, count


def marlin_codes(packed: Tensor) -> Tensor:
    """[N, K/2] uint8 -> int32 [K/16, 2 N]. A word is what one lane of a warp decodes for a 16 x 16 tile: lane
    4 c + i has, of columns c and c + 8, rows 2 i, 2 i + 1, 2 i + 8 and 2 i + 9, even rows' nibbles first."""
    N, K = packed.shape[0], 2 * packed.shape[1]
    codes = torch.stack([packed & 15, packed >> 4], -1)  # [N, K/2, 2]
    codes = codes.view(N // 64, 4, 2, 8, K // 16, 2, 4, 2)  # chunk, tile, +8, c, k tile, +8 rows, i, odd row
    nibbles = codes.permute(4, 0, 3, 6, 1, 7, 2, 5).reshape(K // 16, 2 * N, 4, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int32).squeeze(-1)


def marlin_scales(sf: Tensor, factor: float) -> Tensor:
    """[N, S] -> float8 [S, N] of 5 exponent bits and 3 of mantissa, in the order lanes want them."""
    N, S = sf.shape
    s = sf.float().T.reshape(S, N // 64, 8, 8).transpose(2, 3).reshape(S, -1, 2, 2).transpose(2, 3)
    half = (s.reshape(S, N) * (128 * factor)).half()
    half = torch.where(half < 2, 0, half)  # vLLM flushes them
    return (half.view(torch.int16) >> 7).to(torch.uint8).view(torch.float8_e4m3fn)


def marlin_weights(w: Nvfp4Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = float(w.sf.float().amax())
    factor = 2.0 ** int(torch.tensor(448 / largest).log2().floor())
    codes = torch.stack([marlin_codes(p) for p in w.packed])
    scales = torch.stack([marlin_scales(sf, factor) for sf in w.sf])
    return codes, scales, w.alpha * (2.0**119 / factor)


def padded(layer: Layer) -> tuple[Nvfp4Tensor, Nvfp4Tensor, int]:
    """I grown to what Marlin's tiles want, as vLLM grows it."""
    H, I = layer.model.hidden, layer.model.intermediate
    step = 64 if H % 128 == 0 else 128
    more = -I % step
    w13, w2 = layer.w13, layer.w2
    if more:
        grow = lambda t: pad(t.unflatten(1, (2, I)), (0, 0, 0, more)).flatten(1, 2)  # noqa: E731
        sf = grow(w13.sf.view(torch.uint8)).view(torch.float8_e4m3fn)
        w13 = Nvfp4Tensor(grow(w13.packed), sf, w13.alpha)
        w2 = w2.padded(H, I + more)
    return w13, w2, I + more


def make(layer: Layer) -> dict[str, Callable[[Tokens], Tensor]]:
    moe, model = operators(), layer.model
    first, second, I = padded(layer)
    first, second = marlin_weights(first), marlin_weights(second)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    locks = torch.zeros(processors * BLOCKS_PER_SM, dtype=torch.int32, device="cuda")

    def gemm(a, weights, places, t: Tokens, block: int, top_k: int, N: int, K: int) -> Tensor:
        codes, scales, alpha = weights
        out = a.new_empty(t.ids.numel(), N)
        return moe.moe_wna16_marlin_gemm(
            a, out, codes, None, scales, None, alpha, None, locks, *places, t.weights, block, top_k,
            top_k == 1, E2M1, len(a), N, K, False, True, False, -1, -1, -1,
        )  # fmt: skip

    def run(t: Tokens) -> Tensor:
        rows = t.ids.numel()
        block = next((b for b in (8, 16, 32, 48) if rows / model.experts / b < 0.9), 64)
        places = align(t.ids, model.experts, block)
        gate_up = gemm(t.x, first, places, t, block, model.top_k, 2 * I, model.hidden)
        y = gemm(ops.swiglu(gate_up), second, places, t, block, 1, model.hidden, I)
        out = torch.empty_like(t.x)
        moe.moe_sum(y.view(*t.ids.shape, model.hidden), out, None, None)
        return out

    return {"Marlin": run}

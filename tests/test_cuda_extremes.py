"""Largest and smallest sizes on the GPU: T from 0 to 65,536, 1,024 experts, top 32, K = 32,768; and the
memory that a call takes beside its outputs."""

import pytest
import torch
from cases import lively, ragged_offsets, random_packed, random_sf, random_weights
from compare import assert_close_layers, assert_same_bits
from conftest import missing_gpu

from nvfp4_moe import ops, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing_gpu() is not None, reason=str(missing_gpu()))]

T, E, TOP_K, K = 65536, 1024, 32, 32768
SHAPES = [(0, K), (0, 16), (3, K), (T, 32), (1, 16)]  # of activations


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def bf16(*shape: int) -> torch.Tensor:
    return lively(*shape, dtype=torch.bfloat16)


def codes(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random_packed(*shape[:-1], shape[-1] // 2), random_sf(*shape[:-1], shape[-1] // 16)


def random_ids(T: int, E: int, k: int) -> torch.Tensor:
    return torch.randint(-1, E + 1, (T, k), dtype=torch.int32)


def routing(T: int, E: int, k: int):
    return torch.randn(T, E).round(decimals=2), None, k, "softmax", 1, 1, True, 1.0


def sums(T: int, k: int, H: int):
    return bf16(99, H), torch.randint(-1, 99, (T, k), dtype=torch.int32), torch.randn(T, k)


def mxfp4(E: int, N: int, K: int, method: str):
    e8m0 = torch.randint(90, 125, (E, N, K // 32), dtype=torch.uint8)
    return random_packed(E, N, K // 2), e8m0, method


CALLS = {
    "tensor_scale": lambda: [(bf16(*s),) for s in (*SHAPES, (T, 512))],
    "quantize": lambda: [(bf16(*s), torch.rand(s[0]) + 0.01) for s in SHAPES],
    "quantize_rows": lambda: [
        *((bf16(*s), None) for s in SHAPES),
        (bf16(T, 32), torch.randint(T, (2 * T,), dtype=torch.int32)),
        (bf16(3, 2 * K), None),
    ],
    "dequantize": lambda: [(*codes(*s), torch.rand(s[0]), torch.bfloat16) for s in SHAPES],
    "remap_sf": lambda: [(random_sf(*s),) for s in ((E, 3, 2), (2, T, 5), (3, K // 16), (0, 7), (E, 0, 4))],
    "unmap_sf": lambda: [
        (reference.remap_sf(random_sf(*s)), *s[-2:]) for s in ((E, 3, 2), (T, 5), (3, K // 16), (0, 7))
    ],
    "mxfp4_to_nvfp4": lambda: [
        mxfp4(*s, method)
        for s in ((E, 1, 32), (2, 3, K), (1, T, 32), (0, 4, 32), (2, 0, 32))
        for method in ops.MXFP4_METHODS
    ],
    "route": lambda: [routing(*s) for s in ((0, E, TOP_K), (T, E, TOP_K), (1, E, TOP_K), (9, 8 * E, TOP_K))],
    "permute": lambda: [
        (random_ids(*s), s[1], 0)
        for s in ((0, E, TOP_K), (T, E, TOP_K), (T, 1, 1), (1, E, TOP_K), (7, 4 * E, 3))
    ],
    "swiglu": lambda: [
        (bf16(*s), act, 1.702, 7.0) for s in ((3, 2 * K), (T, 32), (0, 32)) for act in ops.ACTS
    ],
    "swiglu_quantize": lambda: [
        (bf16(*s), act, 1.702, 7.0) for s in ((3, 2 * K), (T, 32), (0, 32)) for act in ops.ACTS
    ],
    "combine": lambda: [
        sums(*s) for s in ((T, TOP_K, 16), (3, TOP_K, K), (0, TOP_K, 64), (T, 0, 16), (1, 1, 5))
    ],
}


@pytest.mark.parametrize("name", CALLS)
def test_bits_are_the_cpus(name):
    for args in CALLS[name]():
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        op = getattr(torch.ops.nvfp4, name)
        assert_same_bits(op(*on_gpu), op(*args), f"{name} of {shapes}")


def move(args: tuple) -> list:
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "R, N, K, E", [(70, 24, K, 2), (2000, 16, 64, E), (T, 8, 32, 3), (0, 8, K, 2), (1, 40000, 32, 1)], ids=str
)
def test_grouped_products_agree_with_the_cpus(R, N, K, E, quantized):
    w, a = random_weights(E, N, K), bf16(R, K)
    a = ops.quantize_rows(a) if quantized else (a, None, None)
    args = (*a, w.b, w.b_sf, w.alpha, ragged_offsets(R, E))
    assert_close_layers(ops.grouped_gemm(*move(args)), ops.grouped_gemm(*args))


@pytest.mark.parametrize(
    "T, E, k, H, I",
    [(T, E, TOP_K, 32, 16), (3, 4, 2, K, 32), (3, 4, 2, 32, K), (0, E, TOP_K, 32, 32)],
    ids=str,
)
@pytest.mark.parametrize("compute", ops.COMPUTES)
def test_layers_agree_with_the_cpus(T, E, k, H, I, compute):
    w13, w2 = random_weights(E, 2 * I, H, 2), random_weights(E, H, I)
    operands = (bf16(T, H), random_ids(T, E, k), torch.rand(T, k))
    args = (*operands, w13.b, w13.b_sf, w13.alpha, w2.b, w2.b_sf, w2.alpha, 0, compute)
    assert_close_layers(ops.moe(*move(args)), ops.moe(*args))


def workspace(call) -> int:
    """Bytes that a call takes from torch's allocator beside its outputs."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del out
    return peak - before - (after - before)


@pytest.mark.parametrize("name", sorted({*CALLS} - {"permute", "mxfp4_to_nvfp4"}))
def test_no_scratch_memory_is_taken(name):
    args = move(CALLS[name]()[2])
    assert workspace(lambda: getattr(torch.ops.nvfp4, name)(*args)) == 0


def test_scratch_memory_is_bounded():
    ids = random_ids(T, E, TOP_K).cuda()
    assert workspace(lambda: ops.permute(ids, E, 0)) <= 128 * E * 4  # a count a tile and expert
    for method in ops.MXFP4_METHODS:
        packed, e8m0, _ = move(mxfp4(8, 512, 1024, method))
        most = 8 * (
            40 * 1024 + 11 * 512 * 8
        )  # statistics and tables of a matrix, an error a candidate and row
        assert workspace(lambda m=method, p=packed, e=e8m0: ops.mxfp4_to_nvfp4(p, e, m)) <= most
    T_, E_, k, H, I = 512, 16, 4, 256, 128
    w13, w2 = random_weights(E_, 2 * I, H, 2), random_weights(E_, H, I)
    operands = (bf16(T_, H), random_ids(T_, E_, k), torch.rand(T_, k))
    for compute in ops.COMPUTES:
        args = move((*operands, w13.b, w13.b_sf, w13.alpha, w2.b, w2.b_sf, w2.alpha, 0, compute))
        rows = T_ * k + 128 * E_  # every one in and out of both products, in BF16
        registers = torch.cuda.get_device_properties(0).multi_processor_count << 18  # accumulators handed on
        assert workspace(lambda a=args: ops.moe(*a)) <= rows * 2 * (2 * H + 4 * I) + registers

"""Drawn shapes, strides, values: all operators but the GEMMs give the bits of the CPU on packed operands."""

import torch
from cases import random_packed, random_sf
from compare import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import NAMES

from nvfp4_moe import formats, ops

INF, NAN = torch.inf, torch.nan
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5)
SPECIAL = torch.tensor(
    (
        *TIES,
        0,
        -0.0,
        NAN,
        INF,
        -INF,
        3e38,
        -3e38,
        1e-40,
        -1e-45,
        6,
        7,
        -7,
        86,
        -87,
        125,
        448,
        2688,
        65504,
        1e5,
    )
)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BLOCKS = st.integers(1, 40)  # of 16 values; beyond 1, 4 and 32 of them a row takes other ways


def floats(draw, *shape: int, dtype=torch.float32):
    """Rows of very different size; here and there a special value, or rows of nothing else."""
    rows = torch.randn(*shape[:-1], 1) * draw(st.sampled_from([0, 1, 8, 40]))
    x = torch.randn(shape) * torch.exp2(rows)
    special = SPECIAL[torch.randint(len(SPECIAL), shape)]
    return torch.where(torch.rand(shape) < draw(st.sampled_from([0, 0.02, 1])), special, x).to(dtype)


def placed(how: str, t: torch.Tensor) -> torch.Tensor:
    """The same values: packed, transposed in memory, as every other column, or from an odd address on."""
    if how == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "apart":
        return torch.stack([t, t], -1)[..., 0]
    if how == "odd":
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t
    return t


@st.composite
def calls(draw) -> tuple:
    """An operator's name and arguments that it takes."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    name = draw(st.sampled_from(sorted(MAKERS)))
    return name, MAKERS[name](draw)


def ids(draw):
    T, k, E = draw(st.integers(0, 900)), draw(st.integers(0, 12)), draw(st.integers(0, 300))
    return torch.randint(-2, E + 2, (T, k), dtype=torch.int32), E, T * k


def routing(draw):
    groups = draw(st.integers(1, 9))
    E = groups * draw(st.integers(1, 90))
    logits = floats(draw, draw(st.integers(0, 20)), E, dtype=draw(FLOATS)).round(decimals=1)
    score = draw(st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]))
    bias = floats(draw, E) if draw(st.booleans()) else None
    best = draw(st.integers(1, groups))
    return logits, bias, draw(st.integers(1, min(E, 40))), score, groups, best, draw(st.booleans()), 2.5


def gate_up(draw, step: int):
    act = draw(st.sampled_from(ops.ACTS))
    width = step * draw(BLOCKS) * (1 if act == "relu2" else 2)
    limit = draw(st.sampled_from([7.0, 10.0, 0.1, 1e30, torch.inf, 0.0, -2.0, torch.nan]))
    alpha = draw(st.sampled_from([1.702, 1.0, -0.3, 0.0, 1e3, torch.nan]))
    return floats(draw, draw(st.integers(0, 9)), width, dtype=torch.bfloat16), act, alpha, limit


def values(draw):
    return floats(draw, draw(st.integers(0, 9)), 16 * draw(BLOCKS), dtype=draw(FLOATS))


def scale_for(draw, x):
    return floats(draw, *draw(st.sampled_from([(1,), (len(x),)]))).abs()


def scales(draw):
    return random_sf(draw(st.integers(0, 3)), draw(st.integers(0, 300)), draw(st.integers(0, 70)))


def quantize(draw):
    x = values(draw)
    return x, scale_for(draw, x)


def gathered(draw):
    x = values(draw)
    n = draw(st.integers(0, 30)) if len(x) else 0
    return x, torch.randint(-3, len(x) + 3, (n,), dtype=torch.int32) if draw(st.booleans()) else None


def packed(draw):
    R, S = draw(st.integers(0, 9)), draw(BLOCKS)
    sf = torch.randint(256, (R, S), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return random_packed(R, 8 * S), sf, floats(draw, R), draw(FLOATS)


def interleaved(draw):
    E, rows, cols = draw(st.integers(0, 3)), draw(st.integers(0, 300)), draw(st.integers(0, 70))
    return random_sf(E, formats.sf_cosize(rows, cols)), rows, cols


def mxfp4(draw):
    E, N, S = draw(st.integers(0, 3)), draw(st.integers(0, 40)), draw(st.integers(1, 12))
    low = draw(st.integers(0, 255))
    high = draw(st.sampled_from([low, low + 3, low + 17, low + 18, low + 40, 255]))
    e8m0 = torch.randint(low, min(high, 255) + 1, (E, N, S), dtype=torch.uint8)
    live = torch.rand(E, N, S, 1) < draw(st.sampled_from([0, 0.1, 1]))
    codes = random_packed(E, N, S, 16) * live
    return codes.flatten(-2), e8m0, draw(st.sampled_from(ops.MXFP4_METHODS))


def sums(draw):
    R, H, T, k = (draw(st.integers(0, most)) for most in (60, 300, 20, 12))
    slots = torch.randint(-2, R + 2, (T, k), dtype=torch.int32)
    return floats(draw, R, H, dtype=torch.bfloat16), slots, floats(draw, T, k)


MAKERS = {
    "tensor_scale": lambda draw: (values(draw),),
    "quantize": quantize,
    "quantize_rows": gathered,
    "dequantize": packed,
    "remap_sf": lambda draw: (scales(draw),),
    "unmap_sf": interleaved,
    "mxfp4_to_nvfp4": mxfp4,
    "route": routing,
    "permute": lambda draw: (*ids(draw)[:2], draw(st.integers(-3, 9))),
    "swiglu": lambda draw: gate_up(draw, draw(st.sampled_from([1, 8, 16]))),
    "swiglu_quantize": lambda draw: gate_up(draw, 16),
    "combine": sums,
}


@settings(max_examples=1000, deadline=None)
@given(call=calls(), how=st.sampled_from(["packed", "transposed", "apart", "odd"]))
def test_bits_depend_on_values_alone(call, how, device):
    name, args = call
    op = getattr(torch.ops.nvfp4, name)
    here = [placed(how, a.to(device)) if isinstance(a, torch.Tensor) else a for a in args]
    with torch.inference_mode():
        assert_same_bits(op(*here), op(*args), f"{name}, {how}")


def test_every_operator_but_those_of_weights_is_drawn():
    """Weights are taken as they lie, or refused: test_gemm.py, test_moe.py, test_pack.py."""
    assert set(MAKERS) == set(NAMES) - {"grouped_gemm", "linear", "moe", "pack_sm90", "unpack_sm90"}

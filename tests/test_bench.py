"""What bench/moe.py prints rests on: the floor, the layout it hands to Marlin, the table."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from nvfp4_moe import Nvfp4Tensor, ops


def bench(*names: str) -> list:
    """Modules of bench/, where `cases` is another than the tests' own."""
    folder, ours = str(Path(__file__).resolve().parents[1] / "bench"), sys.modules.pop("cases", None)
    sys.path.insert(0, folder)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(folder)
        del sys.modules["cases"]
        if ours:
            sys.modules["cases"] = ours


cases, moe_layer, moe_table, peers_vllm, peers_elementwise = bench(
    "cases", "moe_layer", "moe_table", "peers_vllm", "peers_elementwise"
)
DSV4, QWEN3 = cases.MODELS[:2]


def tokens(model, T: int) -> moe_layer.Tokens:
    ids = torch.rand(T, model.experts).topk(model.top_k).indices.int()
    return moe_layer.Tokens(torch.zeros(T, model.hidden), ids, torch.rand(ids.shape))


@pytest.mark.parametrize(
    "model, T, weight_bytes, floor_us",
    [(DSV4, 1, 222_953_472, 49.05), (QWEN3, 1, 21_233_664, 4.69), (DSV4, 16384, 1_783_627_776, 16440)],
)
def test_the_floor_is_reading_for_few_tokens_and_multiplying_for_many(model, T, weight_bytes, floor_us):
    work = moe_layer.work(model, tokens(model, T))
    assert work.weight_bytes == weight_bytes
    assert work.floor_us == pytest.approx(floor_us, rel=1e-3)
    assert work.floor_us == (work.memory_us if T == 1 else work.tensor_us)


def test_marlin_codes_are_what_each_lane_decodes():
    N, K = 128, 48
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)  # [N, K]
    words = peers_vllm.marlin_codes(packed)
    assert words.shape == (K // 16, 2 * N)
    for tile, chunk, lane, j in [(0, 0, 0, 0), (1, 1, 5, 2), (2, 0, 31, 3)]:
        word = int(words[tile, chunk * 128 + lane * 4 + j]) & 0xFFFFFFFF
        column, row = chunk * 64 + j * 16 + lane // 4, tile * 16 + 2 * (lane % 4)
        places = [(0, 0), (0, 8), (8, 0), (8, 8), (0, 1), (0, 9), (8, 1), (8, 9)]  # column, row, by nibble
        got = [word >> 4 * i & 15 for i in range(8)]
        assert got == [int(codes[column + c, row + r]) for c, r in places]


def test_marlin_scales_keep_their_value():
    w = Nvfp4Tensor.quantize(torch.randn(2, 64, 64) * 0.02)
    _, scales, alpha = peers_vllm.marlin_weights(w)
    half = (scales.view(torch.uint8).short() << 7).view(torch.float16).float()  # E5M3
    decoded = half * (alpha * 2.0**-119 / 128)[:, None, None]
    want = w.sf.float() * w.alpha[:, None, None]
    assert torch.equal(decoded.flatten(1).sort().values, want.flatten(1).sort().values)


def test_the_table_shows_who_is_ahead_and_who_is_missing(capsys):
    times = {
        name: {"us": us, "low": us, "high": us + 1}
        for name, us in {"ours bf16": 60.0, "ours bf16 public": 69.0, "Marlin": 105.0}.items()
    }
    row = {
        "model": DSV4.name, "T": 1, "hit": 6, "weight_bytes": 222_953_472, "flop": 792_723_456,
        "floor_us": 49.0, "memory_us": 49.0, "failed": {"humming": "No module named 'humming'"},
        "times": times,
        "kernels": {"bf16": [("void nvfp4::sm90::(anonymous namespace)::decode<8>(P)", 56000.0)]},
    }  # fmt: skip
    moe_table.show_model(DSV4, [row], {"launch us": 4.0, "read TB/s": 4.55, "BF16 8192^3 TFLOP/s": 790.0})
    moe_table.show_breakdown([row])
    moe_table.show_summary([row])
    text = capsys.readouterr().out
    assert " 1.75x" in text and "n/a humming: No module named 'humming'" in text
    assert "88% read" in text and "56.0 = 56.0 decode<8>" in text
    assert "behind the best peer: nowhere" in text
    assert " 69.0 " in text and "public layout / ours, geometric mean: T <= 64 1.150, all 1.150" in text


def test_the_formulas_given_to_torch_compile_are_the_operators():
    """Sums and exponentials are torch's own; all else is the same, bit for bit."""
    formulas, x = peers_elementwise, torch.randn(256, 128).bfloat16()
    same = lambda got, want: all(  # noqa: E731
        torch.equal(g.view(torch.uint8), w.view(torch.uint8)) for g, w in zip(got, want, strict=True)
    )
    quantized = ops.quantize_rows(x)
    assert same(formulas.quantize_rows(x), quantized)
    scale = torch.tensor(0.01)
    assert same(formulas.quantize(x, scale), ops.quantize(x, scale))
    assert same([formulas.dequantize(*quantized)], [ops.dequantize(*quantized, torch.bfloat16)])
    sf = quantized[1][None]
    assert same([formulas.remap_sf(sf).flatten(1)], [ops.remap_sf(sf)])
    packed, e8m0 = (
        torch.randint(*r, (2, 4, n), dtype=torch.uint8) for r, n in (((0, 256), 64), ((110, 122), 4))
    )
    assert same(formulas.mxfp4_lossless(packed, e8m0), ops.mxfp4_to_nvfp4(packed, e8m0, "best"))
    close = {"rtol": 2.0**-7, "atol": 1e-6}
    torch.testing.assert_close(formulas.swiglu(x), ops.swiglu(x), **close)
    torch.testing.assert_close(formulas.swiglu_limit(x), ops.swiglu(x, "swiglu_limit", 1.0, 7.0), **close)
    logits, bias = torch.randn(9, 256), torch.randn(256)
    for formula, *how in ((formulas.route,), (formulas.grouped_route, "sigmoid", 8, 4, True, 2.5)):
        offered = bias if how else None
        got, want = formula(logits, offered, 8), ops.route(logits, offered, 8, *how)
        torch.testing.assert_close(got, (want[0], want[1].long()), rtol=1e-5, atol=0)
    weights, ids = ops.route(torch.randn(9, 16), None, 3)
    slots = ops.permute(ids, 16, 0)[2]
    torch.testing.assert_close(formulas.combine(x, slots, weights), ops.combine(x, slots, weights), **close)

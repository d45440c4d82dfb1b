"""MXFP4 -> NVFP4: what each way of converting loses, on 27 tensors.

The tensors are those of NVIDIA Model-Optimizer's study (pull request 1364), drawn here again: one stream of
random numbers, the same order, their MXFP4 rule. The error is the mean square, in float64, of the converted
weights' distance from the MXFP4 ones. docs/mxfp4_to_nvfp4.md discusses the table.

    python bench/mxfp4_study.py [--seed 0] [--plot docs/mxfp4_to_nvfp4.png]
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_moe import ops
from nvfp4_moe.formats import BLOCK, MX_BLOCK, TENSOR_MAX, pack, unpack
from nvfp4_moe.reference.mxfp4 import quantize_best

METHODS = ("requantize", "verbatim_midpoint", "verbatim_search", "hybrid", "best")
ROWS, COLS = 256, 1024
CODE_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)

# ---- the tensors ----------------------------------------------------------------------------------------


def normal(std: float = 1.0, rows: int = ROWS, cols: int = COLS) -> Tensor:
    return std * torch.randn(rows, cols)


def chance(x: Tensor, p: float) -> Tensor:
    return torch.rand_like(x) < p


def signs(n) -> Tensor:
    return torch.sign(torch.randn(n) + 1e-6)


def stepped(std: float, first: int, span: int) -> Tensor:
    """16 chunks of rows, scaled by powers of two that step over `span`."""
    exponent = torch.tensor([first + span * i // 15 for i in range(16)]).repeat_interleave(ROWS // 16)
    return normal(std) * 2.0 ** exponent[:, None]


def with_some(x: Tensor, p: float, values: Callable[[int], Tensor]) -> Tensor:
    mask = chance(x, p)
    x[mask] = values(int(mask.sum()))
    return x


def scaled_where(x: Tensor, p: float, by: float) -> Tensor:
    return torch.where(chance(x, p), by * x, x)


def scaled_rows(x: Tensor, count: int, by: float) -> Tensor:
    x[torch.randperm(len(x))[:count]] *= by
    return x


def scaled_columns(x: Tensor, count: int, by: float) -> Tensor:
    x[:, torch.randperm(x.shape[1])[:count]] *= by
    return x


def power_law() -> Tensor:
    u = torch.rand(ROWS, COLS).clamp(min=1e-6)
    return 0.05 * (u ** (-1 / 1.5) - 1) * torch.sign(torch.randn_like(u))


def row_outliers() -> Tensor:
    x = normal(0.01)
    rows, columns = torch.randperm(ROWS)[:4], torch.randperm(COLS)[: COLS // 64]
    for row in rows:
        x[row, columns] = 30 * signs(len(columns))
    return x


def one_outlier() -> Tensor:
    x = normal(0.005)
    x[ROWS // 2, COLS // 2] = 1e4
    return x


def two_signs() -> Tensor:
    return torch.where(torch.rand(ROWS, COLS) < 0.5, 3.0, -3.0) + normal(0.1)


SCENARIOS: dict[str, Callable[[], Tensor]] = {
    "uniform [-1, 1]": lambda: 2 * torch.rand(ROWS, COLS) - 1,
    "gaussian": normal,
    "heavy tail": lambda: normal() * normal().abs(),
    "rare outliers": lambda: with_some(normal(0.05), 1e-3, lambda n: 100 * signs(n)),
    "mixed block scales": lambda: stepped(0.3, -12, 25),
    "narrow range": lambda: normal(0.5) + 1,
    "typical LLM weight": lambda: scaled_where(normal(COLS**-0.5), 1e-4, 50),
    "mostly zeros": lambda: with_some(torch.zeros(ROWS, COLS), 0.01, lambda n: 0.5 * torch.randn(n)),
    "spread 15": lambda: stepped(0.5, -7, 15),
    "spread 17": lambda: stepped(0.5, -8, 17),
    "spread 18": lambda: stepped(0.5, -9, 18),
    "spread 50": lambda: stepped(0.5, -25, 50),
    "bimodal": lambda: with_some(normal(0.01), 0.5, lambda n: 8 * torch.randn(n)),
    "power law": power_law,
    "row outliers": row_outliers,
    "column outliers": lambda: scaled_columns(normal(0.01), COLS // 128, 200),
    "single outlier": one_outlier,
    "tiny (1e-8)": lambda: normal(1e-8),
    "saturating": lambda: normal().clamp(-6, 6),
    "two signs": two_signs,
    "constant": lambda: torch.full((ROWS, COLS), 1.5),
    "QKV 4096 x 4096": lambda: scaled_where(normal(1 / 64, 4096, 4096), 5e-5, 30),
    "MLP 1024 x 4096": lambda: scaled_rows(normal(1 / 64, 1024, 4096), 32, 5),
    "embedding 2048 x 1024": lambda: scaled_rows(normal(0.5, 2048), 8, 20),
    "norm gain 32 x 1024": lambda: normal(0.05, 32) + 1,
    "conv 64 x 1024": lambda: normal(0.1, 64),
    "flat 1024 x 4096": lambda: normal(0.02, 1024, 4096),
}


def tensors(seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All of them in order: each draws from where the last one stopped."""
    torch.manual_seed(seed)
    for name, draw in SCENARIOS.items():
        yield name, draw()


def to_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] through bf16, as Model-Optimizer does: k = ceil(log2(amax / 6)), ties of codes go down."""
    blocks = x.bfloat16().double().unflatten(-1, (-1, MX_BLOCK))
    amax = blocks.abs().amax(-1)
    k = torch.where(amax > 0, (amax / 6).log2().ceil(), -127.0)
    q = blocks * 2.0 ** -k[..., None]
    codes = torch.searchsorted(CODE_MIDDLES, q.abs()) + 8 * (q < 0)
    return pack(codes.flatten(-2)), (k + 127).to(torch.uint8)


# ---- errors ---------------------------------------------------------------------------------------------


def mx_values(packed: Tensor, e8m0: Tensor) -> Tensor:
    """float64 [.., K], exact."""
    return codes_times(packed, 2.0 ** (e8m0.double() - 127), MX_BLOCK)


def nv_values(packed: Tensor, sf: Tensor, alpha: Tensor) -> Tensor:
    """float64 [.., K], exact: a product has 30 bits."""
    return codes_times(packed, sf.double() * alpha.double(), BLOCK)


def codes_times(packed: Tensor, scale: Tensor, block: int) -> Tensor:
    ones = torch.ones(*packed.shape[:-1], packed.shape[-1] * 2 // BLOCK).to(torch.float8_e4m3fn)
    codes = ops.dequantize(packed, ones, torch.tensor(1.0), torch.float32).double()
    return (codes.unflatten(-1, (-1, block)) * scale[..., None]).flatten(-2)


def mean_squared_error(source: tuple, result: tuple) -> float:
    """Over row chunks: the largest tensor has 16.8 M values."""
    packed, sf, alpha = (t.cpu() for t in result)
    total = 0.0
    for rows in torch.arange(len(packed)).split(512):
        d = nv_values(packed[rows], sf[rows], alpha) - mx_values(*(t[rows] for t in source))
        total += float(d.square().sum())
    return total / (2 * packed.numel())


def half_blocks(source: tuple) -> tuple[Tensor, Tensor]:
    """Codes [N, S, 16] and their k [N, S]."""
    packed, e8m0 = source
    return unpack(packed).unflatten(-1, (-1, BLOCK)), (e8m0.int() - 127).repeat_interleave(2, -1)


def flushed(source: tuple, result: tuple, quantized: Tensor) -> tuple:
    """`result` as the quantizer of the study's time made it: without a clamp at 2^-9, a block scale of 2^-10
    or less rounds to 0 and takes its values with it. `quantized` [N, S]: halves that were not kept."""
    packed, sf, alpha = result
    amax = mx_values(*source).abs().unflatten(-1, (-1, BLOCK)).amax(-1)
    lost = quantized & (amax / (6 * alpha.double()) <= 2.0**-10)
    return packed.masked_fill(lost.repeat_interleave(BLOCK // 2, -1), 0), sf, alpha


def searched(source: tuple, result: tuple, quantized: Tensor) -> tuple:
    """`result` with the best of all 126 E4M3 scales for every half that was not kept; alpha stays."""
    packed, sf, alpha = result
    codes, k = half_blocks(source)
    new = unpack(packed).unflatten(-1, (-1, BLOCK))
    new_sf = sf.view(torch.uint8).clone()
    if quantized.any():
        new_sf[quantized], new[quantized] = quantize_best(codes[quantized], k[quantized], alpha)
    return pack(new.flatten(-2)), new_sf.view(torch.float8_e4m3fn), alpha


# ---- the study ------------------------------------------------------------------------------------------


@dataclass
class Row:
    spread: int  # kmax - kmin over blocks with a nonzero value
    m: int  # kmax - 8: hybrid's alpha is 2^m
    outside: int  # blocks whose scale lies outside the window 2^-9 .. 2^8 under it
    blocks: int
    error: dict[str, float]  # by METHODS, and "hybrid searched", "requantize flushed", "hybrid flushed"
    alpha: str  # which one best took


def study(x: Tensor, device: str = "cpu") -> Row:
    packed, e8m0 = source = to_mxfp4(x)
    results = {
        m: tuple(t.cpu() for t in ops.mxfp4_to_nvfp4(packed.to(device), e8m0.to(device), m)) for m in METHODS
    }
    codes, k = half_blocks(source)
    live = (codes & 7 != 0).any(-1)
    live_k = k[live]
    kmin, kmax = int(live_k.min()), int(live_k.max())
    below = live & (k - (kmax - 8) < -9)
    results["hybrid searched"] = searched(source, results["hybrid"], below)
    results["requantize flushed"] = flushed(source, results["requantize"], live)
    results["hybrid flushed"] = flushed(source, results["hybrid"], below)
    error = {name: mean_squared_error(source, result) for name, result in results.items()}
    amax = float(results["requantize"][2])
    outside = int(below.unflatten(-1, (-1, 2)).any(-1).sum())
    alpha = name_of(float(results["best"][2]), kmax, amax)
    return Row(kmax - kmin, kmax - 8, outside, e8m0.numel(), error, alpha)


def name_of(alpha: float, kmax: int, amax_alpha: float) -> str:
    mantissa, exponent = math.frexp(alpha)
    if mantissa == 0.5:
        d = kmax - 8 - (exponent - 1)
        return "2^(kmax-8)" if d == 0 else f"2^(kmax-{8 + d})"
    if alpha == amax_alpha:
        return f"amax/{TENSOR_MAX:.0f}"
    return f"2^kmax/{round(2.0**kmax / alpha)}"


COLUMNS = (
    *METHODS[:3],
    "hybrid",
    "hybrid searched",
    "best",
    "requantize flushed",
    "hybrid flushed",
)


def table(seed: int) -> dict[str, Row]:
    """Prints a markdown table as it goes."""
    print(f"| # | tensor | spread | m | outside | {' | '.join(COLUMNS)} | best's alpha |")
    print("|" + "---|" * (len(COLUMNS) + 6))
    rows = {}
    for i, (name, x) in enumerate(tensors(seed), 1):
        r = rows[name] = study(x)
        errors = [f"{r.error[c]:.2e}" if r.error[c] else "0" for c in COLUMNS]
        cells = [str(i), name, str(r.spread), str(r.m), f"{r.outside}/{r.blocks}", *errors, r.alpha]
        print(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="draw what the document shows (matplotlib)")
    args = parser.parse_args()
    rows = table(args.seed)
    if args.plot:
        from mxfp4_plot import draw

        draw(rows, args.plot)


if __name__ == "__main__":
    with torch.inference_mode():
        main()

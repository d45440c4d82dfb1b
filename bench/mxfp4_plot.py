"""The plot of docs/mxfp4_to_nvfp4.md; called by mxfp4_study.py --plot."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from mxfp4_study import mx_values, nv_values, to_mxfp4
from torch import Tensor

from nvfp4_moe import ops

STYLE = {  # Okabe-Ito colours: told apart by colour-blind readers too
    "requantize": ("#D55E00", "o"),
    "verbatim_search": ("#56B4E9", "v"),
    "hybrid": ("#E69F00", "s"),
    "best": ("#009E73", "D"),
}
DISTANCES = range(10, 25)


def blocks_below(distance: int) -> tuple[Tensor, Tensor]:
    """64 rows of Gaussian blocks, one exponent but for the first block's, `distance` above."""
    torch.manual_seed(0)
    packed, e8m0 = to_mxfp4(torch.randn(64, 1024))
    packed[0, :16] |= 0x07  # the top block holds a 6, as most do
    e8m0[:] = 100
    e8m0[0, 0] = 100 + distance
    return packed, e8m0


def loss_below(method: str) -> list[float]:
    """Relative RMS error, in per cent, of the low blocks."""
    losses = []
    for distance in DISTANCES:
        source = blocks_below(distance)
        want = mx_values(*source)
        d = nv_values(*ops.mxfp4_to_nvfp4(*source, method)) - want
        losses.append(100 * float(d[1:].norm() / want[1:].norm()))
    return losses


def draw(rows: dict, path: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for method, (colour, marker) in STYLE.items():
        left.plot(DISTANCES, loss_below(method), color=colour, marker=marker, label=method, markersize=5)
    left.axvspan(DISTANCES[0], 17.5, color="0.93", zorder=0)
    left.text(10.3, 103, "the window of E4M3: kept bit for bit", va="bottom", color="0.35", fontsize=9)
    left.set(
        xlabel="binades below the tensor's largest block",
        ylabel="relative RMS error of these blocks, %",
        title="A block far below the largest",
        ylim=(-4, 112),
        xlim=(DISTANCES[0], DISTANCES[-1]),
    )
    left.legend(loc="center left")
    lossy = {name: r for name, r in rows.items() if r.outside}
    width = 0.8 / len(STYLE)
    for i, (method, (colour, _)) in enumerate(STYLE.items()):
        heights = [r.error[method] / r.error["hybrid"] for r in lossy.values()]
        at = [j + (i - 1.5) * width for j in range(len(lossy))]
        right.bar(at, heights, width, color=colour, label=method)
    right.axhline(1, color="0.4", linewidth=0.8)
    right.set_xticks(range(len(lossy)), [f"{n}\n(spread {r.spread})" for n, r in lossy.items()], fontsize=8)
    right.set(yscale="log", ylabel="mean squared error / hybrid's", title="The five tensors that exceed it")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)

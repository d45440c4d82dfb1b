"""python bench/plot_moe.py RESULT.json [IMAGE.png]: bench/moe.py's times over the floor, a panel a model, and
its summary."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from moe_table import show_summary

STYLES = {  # in the order of the legend
    "ours bf16": {
        "color": "#c0392b",
        "linewidth": 2.6,
        "zorder": 9,
        "marker": "o",
        "label": "nvfp4_moe, BF16 activations",
    },
    "ours nvfp4": {
        "color": "#e59866",
        "linewidth": 1.6,
        "marker": "o",
        "label": "nvfp4_moe, NVFP4 activations",
    },
    "ours bf16 public": {
        "color": "#c0392b",
        "linewidth": 1.0,
        "linestyle": "--",
        "label": "nvfp4_moe, public layout, BF16 activations",
    },
    "humming grouped": {"color": "#2471a3", "marker": "s"},
    "humming indexed": {"color": "#7fb3d5", "marker": "s"},
    "Marlin": {"color": "#229954", "marker": "^", "label": "Marlin (vLLM)"},
    "BF16": {"color": "#7f8c8d", "marker": "x", "linestyle": ":", "label": "BF16 torch._grouped_mm"},
}


def panel(axes, model: str, rows: list[dict]) -> None:
    for name, style in STYLES.items():
        points = [(r["T"], r["times"][name], r["floor_us"]) for r in rows if name in r["times"]]
        if not points:
            continue
        tokens, ratios = zip(*((T, t["us"] / floor) for T, t, floor in points), strict=True)
        low, high = zip(*((t["low"] / floor, t["high"] / floor) for _, t, floor in points), strict=True)
        axes.plot(tokens, ratios, markersize=4, **{"linewidth": 1.3, "label": name, **style})
        axes.fill_between(tokens, low, high, color=style["color"], alpha=0.2)
    axes.axhline(1, color="black", linewidth=0.8)
    tokens = [r["T"] for r in rows]
    axes.set(title=model, xscale="log", yscale="log", xlabel="tokens", ylabel="time / floor", ylim=(0.95, 16))
    axes.set_xticks(tokens, tokens, rotation=45, fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_yticks([1, 1.5, 2, 3, 4, 6, 8, 12], ["1", "1.5", "2", "3", "4", "6", "8", "12"])
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path, nargs="?")
    args = parser.parse_args()
    report = json.loads(args.result.read_text())
    models = list(dict.fromkeys(r["model"] for r in report["rows"]))
    across, down = min(2, len(models)), -(-len(models) // 2)
    figure, grid = pyplot.subplots(down, across, figsize=(max(7 * across, 13), 4.6 * down), squeeze=False)
    for axes, model in zip(grid.flat, models, strict=False):
        panel(axes, model, [r for r in report["rows"] if r["model"] == model])
    for axes in list(grid.flat)[len(models) :]:
        axes.remove()
    handles, labels = max((axes.get_legend_handles_labels() for axes in figure.axes), key=lambda h: len(h[0]))
    figure.legend(handles, labels, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0.955), frameon=False)
    a = report["about"]
    where = f"{a['name']}, driver {a['driver_version']}, {a['clocks.sm']}, torch {a['torch']}"
    figure.suptitle(
        f"MoE layer after routing, weights cold in L2 · {where} · {a['date']}, commit {a['commit']}"
    )
    figure.tight_layout(rect=(0, 0, 1, 0.91))
    figure.savefig(args.image or args.result.with_suffix(".png"), dpi=110)
    show_summary(report["rows"])


if __name__ == "__main__":
    main()

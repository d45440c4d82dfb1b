"""Histograms as one PNG. Needs matplotlib: pip install nvfp4-moe[plot]."""

import io
from itertools import pairwise

from .finding import Histogram

COLUMNS = 2


def draw(histograms: list[Histogram], title: str = "") -> bytes:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "the pictures of a report need matplotlib: pip install 'nvfp4-moe[plot]'"
        ) from error
    rows = max(1, -(-len(histograms) // COLUMNS))
    figure = Figure(figsize=(12, 2.9 * rows), layout="constrained")  # no pyplot: nothing global, no display
    FigureCanvasAgg(figure)
    for axes in figure.subplots(rows, COLUMNS, squeeze=False).flatten()[len(histograms) :]:
        axes.set_axis_off()
    for axes, histogram in zip(figure.axes, histograms, strict=False):
        _draw(axes, histogram)
        if histogram.edges[-1] - histogram.edges[0] > 3:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def _draw(axes, histogram: Histogram) -> None:
    edges, counts = histogram.edges, histogram.counts
    widths = [b - a for a, b in pairwise(edges)]
    axes.bar(edges[:-1], counts, widths, align="edge", color="#4878a8")
    if max(counts, default=0) > 1000 * max(1, min((c for c in counts if c), default=1)):
        axes.set_yscale("log")
    axes.set_title(histogram.title, fontsize=10)
    axes.set_ylabel(histogram.counted, fontsize=8)
    axes.set_xlabel(histogram.unit + (f"    ({histogram.note})" if histogram.note else ""), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)

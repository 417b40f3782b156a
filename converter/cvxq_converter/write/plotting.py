"""The curve of a measurement as a picture; needs matplotlib, which `cvxq[plot]` brings.

An extra, because only this needs it: the report's charts are drawn by the page itself, where they
follow the reader's theme, and PNG needs a rasterizer that is not worth writing anew.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from cvxq_format.unfinished import write_whole

from cvxq_converter.measure.measurement_file import Record

INK, ACCENT = "#333b45", "#1f6fb2"


def draw_curve(record: Record, path: Path) -> None:
    """Write a PNG or SVG, by the name's ending: loss over rate, and the file's size above.

    The same record gives the same bytes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = record.curve
    rates = np.linspace(curve.lowest_rate, curve.highest_rate, 400)
    slope, least = np.polyfit(
        [p.rate_bits_per_weight for p in curve.points],
        [p.file_bytes / 1e6 for p in curve.points],
        1,  # but for the header's length, every bit costs the same
    )
    style = {"font.size": 10, "svg.hashsalt": "cvxq", "axes.edgecolor": INK, "text.color": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.semilogy(rates, curve.loss_at(rates), color=ACCENT, linewidth=2, label="expected")
        axes.semilogy(
            [t.rate_bits_per_weight for t in curve.trials],
            [t.achieved for t in curve.trials],
            "o",
            color=ACCENT,
            markeredgecolor="white",
            markersize=8,
            label="found in a trial",
        )
        axes.set_xlabel("bits per weight, side information included")
        axes.set_ylabel("KL to the original, nats per token")
        axes.set_xlim(0, curve.highest_rate)
        axes.grid(True, which="major", color="#d8dde3", linewidth=0.8)
        axes.spines["right"].set_visible(False)
        above = axes.secondary_xaxis(
            "top",
            functions=(lambda rate: least + slope * rate, lambda size: (size - least) / slope),
        )
        above.set_xlabel("size of the file, MB")
        axes.legend(frameon=False)
        figure.suptitle(f"{record.source}: {record.parameters:,} parameters", fontsize=11)
        kind, picture = path.suffix.lower()[1:], io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": "cvxq"}
        figure.savefig(picture, format=kind, dpi=160, metadata=metadata)
    write_whole(path, picture.getvalue())

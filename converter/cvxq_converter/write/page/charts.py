"""Data → shapes of the page's charts, in pixels of a small canvas that the page scales.

The canvas is as wide as a phone, so that its text stays readable there; the template draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cvxq_converter.write.page.axes import Axis

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 388, 14, 218


@dataclass(frozen=True)
class Line:
    """A path, the style class that colours it, and its name in the legend."""

    path: str
    style: str
    name: str


@dataclass(frozen=True)
class Mark:
    """A point, its style class, and what pointing at it tells."""

    x: float
    y: float
    style: str
    title: str


@dataclass(frozen=True)
class Bar:
    """A rectangle, its style class, its label below, the figure above, and a title."""

    x: float
    y: float
    width: float
    height: float
    style: str
    label: str
    value: str
    title: str


@dataclass(frozen=True)
class Chart:
    """Everything that one chart draws. areas: filled paths with their style classes."""

    title: str
    x_label: str
    y_label: str
    x: Axis | None
    y: Axis
    lines: tuple[Line, ...] = ()
    areas: tuple[tuple[str, str], ...] = ()
    marks: tuple[Mark, ...] = ()
    bars: tuple[Bar, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()  # (kind of sample and style classes, name)


def loss_chart(
    rates: Sequence[float],
    losses: Sequence[float],
    trials: Sequence[tuple[float, float]],
    chosen: tuple[float, float] | None,
    asked: float | None,
    loss_name: str,
) -> Chart:
    """Loss over rate, logarithmic; trials (rate, loss), the chosen one, and the limit asked for."""
    seen = [*losses, *(loss for _, loss in trials), asked or losses[0]]
    x = Axis(0, 8, LEFT, RIGHT)
    y = Axis(min(seen) / 1.3, max(seen) * 1.3, BOTTOM, TOP, is_logarithmic=True)
    marks = [
        Mark(x.at(rate), y.at(loss), "trial", f"tried: {rate:.4f} bits, {loss:.3g}")
        for rate, loss in trials
    ]
    legend = [("line accent", "expected")]
    if trials:
        legend.append(("mark trial", "trials"))
    lines = [Line(line_path(x, y, rates, losses), "accent", "expected")]
    if asked is not None:
        level = y.at(asked)
        lines.append(Line(f"M{LEFT} {level}H{RIGHT}", "limit", "asked for"))
        legend.append(("line limit", f"asked for: {asked:.3g}"))
    if chosen is not None:
        rate, loss = chosen
        marks.append(Mark(x.at(rate), y.at(loss), "chosen", f"this file: {rate:.4f} bits"))
        legend.append(("mark chosen", "this file"))
    return Chart(
        title="Loss over rate",
        x_label="bits per weight, side information included",
        y_label=loss_name,
        x=x,
        y=y,
        lines=tuple(lines),
        marks=tuple(marks),
        legend=tuple(legend),
    )


def depth_chart(shares: Sequence[float]) -> Chart:
    """Share of the weights at each bit depth."""
    y = Axis(0, max(shares) * 112, BOTTOM, TOP, unit="%")
    slot = (RIGHT - LEFT) / len(shares)
    bars = []
    for depth, share in enumerate(shares):
        top = y.at(100 * share)
        bars.append(
            Bar(
                x=round(LEFT + depth * slot + slot * 0.12, 1),
                y=top,
                width=round(slot * 0.76, 1),
                height=round(BOTTOM - top, 1),
                style=f"depth{depth}",
                label=str(depth),
                value=percent(share),
                title=f"{depth} bits: {share:.3%} of the weights",
            )
        )
    return Chart("Weights by bit depth", "bits", "share of the weights", None, y, bars=tuple(bars))


def distribution_chart(
    by_group: Sequence[float], by_matrix: Sequence[float], limit: float
) -> Chart:
    """Densities of normalized weights, logarithmic, against the Gaussian and the Laplace."""
    width = 2 * limit / len(by_group)
    centres = [-limit + (i + 0.5) * width for i in range(len(by_group))]
    x = Axis(-limit, limit, LEFT, RIGHT)
    y = Axis(1e-5, 1.2, BOTTOM, TOP, is_logarithmic=True)
    gaussian = [math.exp(-0.5 * c * c) / math.sqrt(2 * math.pi) for c in centres]
    laplace = [math.exp(-math.sqrt(2) * abs(c)) / math.sqrt(2) for c in centres]
    bottom = f"L{x.at(centres[-1])} {BOTTOM}L{x.at(centres[0])} {BOTTOM}Z"
    curves = (
        (gaussian, "reference", "Gaussian"),
        (laplace, "reference dashed", "Laplace"),
        (by_matrix, "second", "weights, by matrix"),
        (by_group, "accent", "weights, by group"),
    )
    return Chart(
        title="Weights against Gaussian and Laplace",
        x_label="weight, in standard deviations",
        y_label="density",
        x=x,
        y=y,
        lines=tuple(Line(line_path(x, y, centres, v), style, name) for v, style, name in curves),
        areas=((line_path(x, y, centres, by_group) + bottom, "accent"),),
        legend=tuple((f"line {style}", name) for _, style, name in reversed(curves)),
    )


def position_chart(positions: Sequence[tuple[int, int, float, float]]) -> Chart:
    """KL over the position in a sequence, from (first, last, KL, standard error) of each run."""
    last = positions[-1][1]
    x = Axis(0, max(last, 1), LEFT, RIGHT)
    y = Axis(0, max(kl + error for *_, kl, error in positions) * 1.08, BOTTOM, TOP)
    middles = [(first + end) / 2 for first, end, *_ in positions]
    upper = [kl + error for *_, kl, error in positions]
    lower = [max(kl - error, 0.0) for *_, kl, error in positions]
    band = line_path(x, y, middles, upper)
    band += "L" + line_path(x, y, middles[::-1], lower[::-1])[1:] + "Z"
    return Chart(
        title="Loss by position",
        x_label="position in the sequence, tokens",
        y_label="KL, nats per token",
        x=x,
        y=y,
        lines=(Line(line_path(x, y, middles, [p[2] for p in positions]), "accent", "mean"),),
        areas=((band, "accent"),),
        legend=(("line accent", "mean"), ("area accent", "± one standard error")),
    )


def line_path(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> str:
    """SVG path through the points."""
    points = (f"{x.at(a)} {y.at(b)}" for a, b in zip(xs, ys, strict=True))
    return "M" + "L".join(points)


def percent(share: float) -> str:
    """A share in at most four characters and the sign; nothing where it would read 0."""
    if share >= 0.0995:
        return f"{share:.0%}"
    return f"{share:.1%}" if share >= 0.0005 else ""

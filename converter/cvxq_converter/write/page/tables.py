"""Data → rows of the page's tables."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^(?P<before>.*?)\.(?P<layer>\d+)\.(?P<kind>.+?)(\.weight)?$")

KINDS = {  # of bytes in a file, in the order in which the page stacks them
    "codes": "packed codes",
    "scales": "scales",
    "means": "means",
    "depths": "bit depths",
    "permutation": "row order",
    "row_scales": "row scales",
    "codebook": "level tables",
    "added_bias": "gained biases",
    "raw": "tensors in 16 or 32 bits",
    "file": "tokenizer, configuration and other files",
    "header": "index",
    "preamble": "preamble",
    "padding": "padding",
}


@dataclass(frozen=True)
class Cell:
    """One matrix in the heat map: its mean depth, its place on the scale in percent, a title."""

    mean_depth: float
    heat: float
    title: str


@dataclass(frozen=True)
class DepthMap:
    """Mean depths by layer and kind of matrix, and those of matrices outside the layers.

    low, high: whole bits that the scale of colours spans.
    """

    low: int
    high: int
    kinds: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    others: list[tuple[str, Cell]]


@dataclass(frozen=True)
class Part:
    """A share of a whole: its key in the style sheet, name, figure as text, and percentage."""

    key: str
    name: str
    text: str
    percent: float


def depth_map(matrices: Sequence[Mapping[str, Any]]) -> DepthMap:
    """Arrange the matrices of a file by layer."""
    means = [matrix["mean_depth"] for matrix in matrices]
    low, high = math.floor(min(means)), math.floor(max(means)) + 1
    layers: dict[int, dict[str, Cell]] = {}
    kinds: dict[str, None] = {}
    others = []
    for matrix in matrices:
        cell = Cell(
            matrix["mean_depth"],
            round(100 * (matrix["mean_depth"] - low) / (high - low), 1),
            f"{matrix['name']}: {matrix['mean_depth']:.2f} bits on average, "
            f"{matrix['pruned_share']:.2%} pruned",
        )
        found = _LAYER.match(matrix["name"])
        if found is None:
            others.append((short_name(matrix["name"]), cell))
            continue
        kinds.setdefault(found["kind"])
        layers.setdefault(int(found["layer"]), {})[found["kind"]] = cell
    return DepthMap(
        low=low,
        high=high,
        kinds=[short_name(kind) for kind in kinds],
        rows=[(str(n), [row.get(kind) for kind in kinds]) for n, row in sorted(layers.items())],
        others=others,
    )


def short_name(name: str) -> str:
    """The last part of a tensor's name that is not `weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def byte_parts(bytes_by_kind: Mapping[str, int]) -> list[Part]:
    """Where the bytes of a file went, in the order of `KINDS`."""
    total = sum(bytes_by_kind.values())
    return [
        Part(kind, name, f"{bytes_by_kind[kind]:,}", 100 * bytes_by_kind[kind] / total)
        for kind, name in KINDS.items()
        if bytes_by_kind.get(kind)
    ]


def time_parts(seconds: Mapping[str, float]) -> list[Part]:
    """Seconds per stage; percentages are of the longest."""
    longest = max(seconds.values(), default=1.0)
    return [
        Part(stage, stage, f"{value:.1f} s", 100 * value / max(longest, 1e-9))
        for stage, value in seconds.items()
    ]


def flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of a nested record as (dotted name, text)."""
    leaves: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            leaves += flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            leaves.append((f"{prefix}{key}", shown))
    return leaves

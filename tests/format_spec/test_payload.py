"""The blocks of a payload against the table of FORMAT.md."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from cvxq_format import Geometry, Layout

FORMAT = Path(__file__).parents[2] / "format_spec" / "FORMAT.md"
SHAPE, GROUP_SIZE, PARTITIONS = (2, 30, 7), 4, 3


def document_rows() -> dict[str, tuple[str, str]]:
    """Name of each block of section 10.2 → count and width as the document gives them."""
    text = FORMAT.read_text("utf-8").split("### 10.2 Blocks")[1].split("### 10.3")[0]
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    return {name.replace(" ", "_"): (count, width) for name, count, width in rows[1:-1]}


def layout(*, separable: bool, cluster_map: bool) -> Layout:
    """Return a layout with everything that goes together."""
    return Layout(
        geometry=Geometry.of(SHAPE, GROUP_SIZE, PARTITIONS, transposed=False),
        scale_bits=5,
        column_bits=7,
        separable=separable,
        means=True,
        permuted=True,
        cluster_map=cluster_map,
        row_scale_bits=3,
    )


LAYOUTS = [layout(separable=s, cluster_map=m) for s in (False, True) for m in (False, True)]


@pytest.mark.parametrize("found", LAYOUTS)
def test_blocks_are_those_of_the_document(found: Layout) -> None:
    experts, rows, columns = SHAPE
    sizes = {"1": 1, "E": experts, "C": 9, "Kc": columns, "R": rows, "N": rows}
    bits = {"⌈log2(*R/P*)⌉": 4, "⌈log2(⌈(*R/P*)/*G*⌉)⌉": 2}
    document = document_rows()
    names = [block.name for block in found.blocks]
    assert names == [name for name in document if name in names]
    for block in found.blocks:
        count, width = document[block.name]
        assert block.count == math.prod(sizes[factor] for factor in count.strip("*").split("·"))
        named = getattr(found, width.strip("`"), None)
        number = width.partition(",")[0]
        assert block.width == (bits.get(width) or named or int(number))


def test_every_block_of_the_document_occurs() -> None:
    assert {block.name for found in LAYOUTS for block in found.blocks} == set(document_rows())

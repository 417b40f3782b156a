"""Every byte of a payload is counted, whichever blocks it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cvxq.summary import KINDS, summarize

VALID = Path(__file__).parents[2] / "format_spec" / "vectors" / "valid"


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("row-scales", {"row_scales"}, {"permutation", "means"}),
        ("cluster-map", {"permutation"}, {"row_scales"}),
        ("everything-of-1.1", {"permutation", "row_scales", "means"}, set()),
        ("everything-at-once", {"permutation", "means"}, {"row_scales"}),
    ],
)
def test_blocks_add_up(name: str, present: set[str], absent: set[str]) -> None:
    summary = summarize(VALID / f"{name}.cvxq")
    kinds = summary.bytes_by_kind
    assert sum(kinds.values()) == summary.file_bytes
    assert present < kinds.keys() <= KINDS.keys() - absent
    blocks = ("codes", "depths", "scales", "means", "permutation", "row_scales")
    payloads = sum(matrix.payload_bytes for matrix in summary.matrices)
    assert sum(kinds.get(kind, 0) for kind in blocks) == payloads


@pytest.mark.parametrize("levels", [400, 200_000])
def test_a_document_that_nests_too_deeply_is_left_out(
    levels: int, make_file: Callable[..., Any]
) -> None:
    deep = b'{"a":' + b"[" * levels + b"]" * levels + b"}"
    made = make_file("llama", files={"report.json": deep, "provenance.json": b'{"source": "x"}'})
    summary = summarize(made.path)
    assert summary.report is None
    assert summary.provenance == {"source": "x"}

"""Every byte of a payload is counted, whichever blocks it has."""

from __future__ import annotations

from pathlib import Path

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

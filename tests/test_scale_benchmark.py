"""The table of docs/scale.md is the one that its benchmark prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import scale  # noqa: E402


def test_the_page_has_what_the_formulas_give(capsys: pytest.CaptureFixture[str]) -> None:
    scale.print_shapes()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 + (len(scale.SHAPES) + 1) * len(scale.AMOUNTS)
    assert printed in (ROOT / "docs" / "scale.md").read_text("utf-8")

"""A GPU's decoder, packed weights and fused kernels included, run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_under_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    file = Path(__file__).with_name("interpreted_decoder.py")
    said = run_interpreted(file)
    assert "1 passed" in said

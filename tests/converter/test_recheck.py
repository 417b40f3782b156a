"""Sampling again what a file was calibrated on: the same tokens, and those its figures are of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cvxq_converter.job import convert
from cvxq_converter.measure.quality import make_references
from cvxq_converter.options import ConversionOptions
from cvxq_converter.recheck import recalibrate
from cvxq_format import Reader


@pytest.mark.parametrize(("limit", "judged"), [(1 << 28, 3), (2 * 2 * 16 * 96, 2), (0, 1)])
def test_figures_are_of_the_same_sequences(
    limit: int,
    judged: int,
    save_network: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cvxq_converter.measure.quality.LOGIT_LIMIT", limit)
    certified: list[torch.Tensor] = []

    def references(network: Any, held_back: torch.Tensor) -> Any:
        found = make_references(network, held_back)
        certified.append(found[1].sequences)
        return found

    monkeypatch.setattr("cvxq_converter.job.make_references", references)
    folder, path = save_network("llama"), tmp_path / "a.cvxq"
    options = ConversionOptions.of(bits=3.0, group_size=16, gain=0.5, sequences=48, length=16)
    convert(str(folder), path, options)
    with Reader(path) as reader:
        provenance = json.loads(reader.file("provenance.json"))
    again = recalibrate(str(folder), provenance)
    assert again.is_same
    assert len(again.certifying) == judged
    assert torch.equal(again.certifying, certified[0])


def test_another_kind_of_processor_is_named(
    save_network: Callable[[str], Path], tmp_path: Path
) -> None:
    """It rounds, and so samples, otherwise: nothing wrong is told of the file."""
    folder, path = save_network("llama"), tmp_path / "a.cvxq"
    options = ConversionOptions.of(bits=3.0, group_size=16, gain=0.5, sequences=8, length=16)
    convert(str(folder), path, options)
    with Reader(path) as reader:
        provenance = json.loads(reader.file("provenance.json"))
    assert recalibrate(str(folder), provenance).differs == ()
    provenance["instructions"] = "AVX7"
    (difference,) = recalibrate(str(folder), provenance).differs
    assert difference.startswith("instructions AVX7, here ")

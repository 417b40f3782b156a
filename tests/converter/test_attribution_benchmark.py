"""What the command of attribution says of a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cvxq_converter.job import prepare
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import preflight
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import load_model
from cvxq_converter.stages import Stages

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_part_has_its_loss_and_its_tokens(
    save_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attribution

    monkeypatch.delitem(sys.modules, "attribution")
    options = ConversionOptions.of(bits=3.5, sequences=6, length=24, group_size=8)
    source = open_source(str(save_network("llama-tied")))
    estimate = preflight(source, options)
    prepared = prepare(load_model(source, options), options, estimate, None, Stages(None))
    windows = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
    lines: list[str] = []
    attribution.report(prepared, options, windows, lines.append)
    second = next(n for n, line in enumerate(lines) if "effective tokens" in line)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    kl = {row[0]: float(row[4]) for row in rows[2:second] if len(row) == 5}
    weights = {row[0]: int(row[1].replace(",", "")) for row in rows[2:second] if len(row) == 5}
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    blocks = ["model.layers.0", "model.layers.1"]
    assert list(kl) == ["everything", "tables of tokens", "all others", *kinds, *blocks]
    assert all(0 < loss < 4 * kl["everything"] for loss in kl.values())
    assert weights["tables of tokens"] + weights["all others"] == weights["everything"]
    assert sum(weights[name] for name in kinds) == weights["all others"]
    assert any("model.embed_tokens.weight" in line and "calibration does" in line for line in lines)
    tokens = {row[0]: float(row[1]) for row in rows[second + 2 :]}
    assert set(kinds) < set(tokens)
    assert all(1 <= known <= 5 * 24 for known in tokens.values())
    assert all("at most" in row[3] for row in rows[second + 2 :])

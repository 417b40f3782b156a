"""The benchmark of the kernels works without a GPU, as far as it can."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu_kernels.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("gpu_kernels")


@pytest.mark.slow
def test_a_dry_run_checks_values() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT), "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(float(line.rpartition("error ")[2]) < 0.03 for line in lines)


def test_no_device_is_said(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == "gpu_kernels: no CUDA device; --dry-run checks values without one"


def test_cells_cover_what_is_promised(script: ModuleType) -> None:
    found = list(script.cells(script.SHAPES))
    assert len(found) == len(set(found))
    for k, n in script.SHAPES:
        for bits in range(1, 9):
            assert script.Cell(k, n, bits, False, 1) in found
        for batch in script.BATCHES:
            assert script.Cell(k, n, 3.0, True, batch) in found


@pytest.mark.parametrize("mean", [2, 3, 3.3, 4])
def test_depths_of_a_mixture_spread(script: ModuleType, mean: float) -> None:
    depths = script.mixed_depths(64, 4096, mean, 0)
    assert abs(float(depths.float().mean()) - mean) < 0.01
    assert (torch.bincount(depths.flatten().int()) > 0.03 * depths.numel()).sum() >= 4
    order = depths.long().sum(0).argsort(stable=True)
    assert (depths[:, order].int().diff(dim=1) >= 0).all()  # separable


def test_a_peer_that_fails_costs_its_column_only(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> float:
        raise AttributeError("no such kernel")

    monkeypatch.setattr("gpu_peers.gemlite_seconds", broken)
    peers = script.Peers(1000, gemlite_budget=60.0)
    assert peers.seconds(64, 64, 1, "gemlite 4") is None
    assert list(peers.complaints) == ["GemLite at 4 bits: AttributeError: no such kernel"]

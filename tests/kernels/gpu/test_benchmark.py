"""The benchmark of the kernels works without a GPU, as far as it can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu_kernels.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_checks_values() -> None:
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(float(line.rpartition("error ")[2]) < 0.03 for line in lines)


def test_no_device_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run()
    assert done.returncode == 1
    assert done.stderr == "gpu_kernels: no CUDA device; --dry-run checks values without one\n"


CHECKS = """
from gpu_kernels import BATCHES, SHAPES, cells, Cell
from gpu_weights import mixed_depths
import torch
found = list(cells(SHAPES))
assert len(found) == len(set(found))
for k, n in SHAPES:
    for bits in range(1, 9):
        assert Cell(k, n, bits, False, 1) in found
    for batch in BATCHES:
        assert Cell(k, n, 3.0, True, batch) in found
for mean in (2, 3, 3.3, 4):
    depths = mixed_depths(64, 4096, mean, 0)
    assert abs(float(depths.float().mean()) - mean) < 0.01
    assert (torch.bincount(depths.flatten().int()) > 0.03 * depths.numel()).sum() >= 4
    order = depths.long().sum(0).argsort(stable=True)
    assert (depths[:, order].int().diff(dim=1) >= 0).all()  # separable
"""


def test_cells_cover_what_is_promised() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", CHECKS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

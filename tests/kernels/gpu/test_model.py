"""The arithmetic of the model of devices that are not here, and the page that shows its figures."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("model_gpu")


def test_programs_share_all_chunks(model: ModuleType) -> None:
    chunks = model.chunks_of(1024, 512, 3)
    programs, parts = model.shares(chunks, 8)
    assert parts > 1
    assert np.array_equal(programs.sum(0)[1:], chunks.sum(0)[1:])


@pytest.mark.parametrize("bits", [2.5, 3, 4])
def test_programs_have_equal_work_and_reach_the_goals(model: ModuleType, bits: float) -> None:
    """Shares of the bound that an H100 is to reach, by the model; a device has the last word."""
    token = model.model_token(bits, model.DEVICES[0])
    assert all(matrix.slowest <= 1.3 for matrix in token.matrices)
    assert token.share >= {2.5: 0.55, 3: 0.6, 4: 0.65}[bits]


def test_programs_wait_for_places(model: ModuleType) -> None:
    assert model.makespan(np.array([3.0, 1, 1, 1]), 2) == 3
    assert model.makespan(np.array([1.0, 1, 1, 3]), 2) == 4  # the heavy one last
    assert model.makespan(np.array([1.0, 1, 1, 3]), 4) == 3


def test_bytes_of_a_matrix(model: ModuleType) -> None:
    """Two clusters of 64 rows: three chunks of depth 2, one of depth 5."""
    chunks = np.zeros((2, 9), np.int64)
    chunks[0, 2], chunks[1, 2], chunks[1, 5] = 2, 1, 1
    words, tables = (3 * 2 + 5) * 64 * 4, 4 * (32 + 4)
    assert model.matrix_bytes(chunks, 64) == words + tables + 128 * 8 + 64 * 4


def test_a_matrix_takes_what_its_slowest_resource_takes(model: ModuleType) -> None:
    found = model.Matrix("", 1.0, bound_us=2.0, issue_us=3.0, chain_us=1.0, outside_us=4.0)
    assert found.stream_us == 3
    assert found.microseconds == 7


@pytest.mark.slow
def test_the_page_has_the_models_figures(model: ModuleType) -> None:
    device = model.DEVICES[0]
    tokens = [model.model_token(bits, device) for bits in (2.5, 3, 4)]
    page = (ROOT / "docs" / "gpu.md").read_text()
    for row in model.table(tokens):
        assert row in page


@pytest.fixture
def gemm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("model_gemm")


@pytest.mark.parametrize(("batch", "goal"), [(8, 0.52), (16, 0.52), (64, 1.0)])
def test_the_small_gemm_is_no_slower_than_it_was(gemm: ModuleType, batch: int, goal: float) -> None:
    """Over cuBLAS in float16, all matrices of a layer, at 3 bits on an H100, by the model."""
    found = gemm.products(3, batch, gemm.DEVICES[0])
    ours, theirs = (sum(getattr(p, n) for p in found) for n in ("microseconds", "dense_us"))
    assert ours <= goal * theirs


@pytest.mark.slow
def test_the_page_has_the_small_gemms_figures(gemm: ModuleType) -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    for row in gemm.table(gemm.DEVICES[:1], (3, 4), (8, 16, 64)):
        assert row in page

"""The compander's tables and Lloyd–Max ones, and the errors that both leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cvxq_converter.quantize.companding import (
    HISTOGRAM_BINS,
    HISTOGRAM_LIMIT,
    LevelHistogram,
    boundaries,
    default_levels,
    fit_levels,
    make_codebook,
)
from cvxq_format.codebook import DEPTHS
from hypothesis import given, settings
from hypothesis import strategies as st

# Squared error of the optimum for unit Gaussians: J. Max, Quantizing for minimum distortion, 1960.
GAUSSIAN_OPTIMUM = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


def histogram_of(density: np.ndarray) -> LevelHistogram:
    return LevelHistogram(density / density.sum() * 1e6)


def centres() -> np.ndarray:
    return (np.arange(HISTOGRAM_BINS) + 0.5) * (HISTOGRAM_LIMIT / HISTOGRAM_BINS)


def gaussian() -> LevelHistogram:
    return histogram_of(np.exp(-(centres() ** 2) / 2))


def laplacian() -> LevelHistogram:
    return histogram_of(np.exp(-np.sqrt(2) * centres()))


def error_of(histogram: LevelHistogram, levels: np.ndarray) -> float:
    """Mean squared error of weights so distributed, each at its nearest level."""
    nearest = np.abs(centres()[:, None] - levels).argmin(1)
    return float(histogram.counts @ (centres() - levels[nearest]) ** 2 / histogram.counts.sum())


def test_the_default_levels_expand_the_middles_of_equal_cells() -> None:
    for depth, levels in zip(DEPTHS, default_levels(), strict=True):
        u = (np.arange(1 << depth) + 0.5) / (1 << depth) - 0.5
        expected = -3 / np.sqrt(2) * np.sign(u) * np.log(1 - 2 * np.abs(u))
        assert levels == pytest.approx(expected, rel=1e-6)
        theta = levels.astype(np.float64)
        sigma = 0.5 * (1 + np.sign(theta) * (1 - np.exp(-np.sqrt(2) * np.abs(theta) / 3)))
        assert sigma == pytest.approx(u + 0.5, abs=1e-7)


@pytest.mark.parametrize("depth", GAUSSIAN_OPTIMUM)
def test_levels_fitted_to_a_gaussian_reach_the_known_optimum(depth: int) -> None:
    error = error_of(gaussian(), fit_levels(gaussian(), depth))
    assert error == pytest.approx(GAUSSIAN_OPTIMUM[depth], rel=0.005)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("density", [gaussian, laplacian])
def test_fitted_levels_err_less_than_the_compander(depth: int, density: object) -> None:
    histogram = density()  # type: ignore[operator]
    fitted, fixed = fit_levels(histogram, depth), default_levels()[depth - 1]
    assert error_of(histogram, fitted) < error_of(histogram, fixed)


@settings(max_examples=25)
@given(st.integers(0, 1 << 32), st.integers(1, 8), st.integers(1, 60))
def test_fitted_levels_are_symmetric_and_strictly_ascending(
    seed: int, depth: int, filled: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = np.zeros(HISTOGRAM_BINS)
    counts[rng.integers(0, HISTOGRAM_BINS, filled)] = rng.exponential(1, filled)
    levels = fit_levels(LevelHistogram(counts), depth)
    assert levels.dtype == np.float32
    assert len(levels) == 1 << depth
    assert np.isfinite(levels).all()
    assert (np.diff(levels) > 0).all()
    assert (levels == -levels[::-1]).all()


def test_neighbouring_levels_are_the_means_of_their_cells() -> None:
    levels = fit_levels(gaussian(), 3).astype(np.float64)
    edges = np.concatenate([[0], boundaries(levels)[4:], [HISTOGRAM_LIMIT]])
    counts, x = gaussian().counts, centres()
    for i, level in enumerate(levels[4:]):
        cell = (x > edges[i]) & (x <= edges[i + 1])
        assert level == pytest.approx((counts[cell] * x[cell]).sum() / counts[cell].sum(), abs=1e-3)


def test_without_weights_the_fit_is_the_compander() -> None:
    for depth, levels in zip(DEPTHS, default_levels(), strict=True):
        assert (fit_levels(LevelHistogram.empty(), depth) == levels).all()


def test_the_histogram_counts_magnitudes_by_row_weight() -> None:
    histogram = LevelHistogram.empty()
    width = HISTOGRAM_LIMIT / HISTOGRAM_BINS
    weight = torch.tensor([[0.5 * width, -2.5 * width], [2.4 * width, -1e9]])
    histogram.add(weight, torch.tensor([1.0, 0.25]))
    assert histogram.counts[[0, 2, HISTOGRAM_BINS - 1]].tolist() == [1.0, 1.25, 0.25]
    assert histogram.counts.sum() == 2.5


def test_the_scale_table_is_zero_and_a_ladder_that_ends_at_one() -> None:
    table = make_codebook(default_levels(), 6).scale_table
    assert table.dtype == np.float32
    assert len(table) == 64
    assert table[0] == 0
    assert table[-1] == 1
    assert table[2:] / table[1:-1] == pytest.approx(2 ** (1 / 8))


def test_a_codebook_keeps_its_parts() -> None:
    codebook = make_codebook(default_levels(), 5)
    assert codebook.scale_bits == 5
    assert codebook.depth_thresholds.tolist() == [128 + 256 * i for i in range(8)]
    assert (codebook.levels[2] == default_levels()[2]).all()

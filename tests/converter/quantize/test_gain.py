"""The gain: ratios of the shrinkage, folded into the level tables."""

from __future__ import annotations

import numpy as np
import pytest
from cvxq_converter.quantize.companding import (
    HISTOGRAM_BINS,
    HISTOGRAM_LIMIT,
    LevelHistogram,
    boundaries,
    fit_levels,
)
from cvxq_converter.quantize.gain import shrinkage_ratios, with_gain
from cvxq_format import Codebook


def test_ratios_are_pooled_over_matrices_by_depth() -> None:
    energies = [np.array([0, 8.0, 3.0, 0, 0, 0, 0, 0, 0]), np.array([5.0, 4, 0, 0, 0, 0, 0, 0, 0])]
    projections = [np.array([0, 6.0, 3, 0, 0, 0, 0, 0, 0]), np.array([0, 2.0, 0, 0, 0, 0, 0, 0, 0])]
    assert shrinkage_ratios(energies, projections).tolist() == [1, 1.5, 1, 1, 1, 1, 1, 1, 1]


def test_absurd_ratios_are_bounded() -> None:
    energy, projection = np.full(9, 1.0), np.full(9, 1e-9)
    assert shrinkage_ratios([energy], [projection]).tolist() == [2.0] * 9
    assert shrinkage_ratios([projection], [energy]).tolist() == [0.5] * 9
    assert shrinkage_ratios([energy], [-energy]).tolist() == [1.0] * 9


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_levels_of_each_depth_are_multiplied(exponent: float) -> None:
    codebook = Codebook.default()
    ratios = 1 + np.arange(9) / 10
    gained = with_gain(codebook, ratios, exponent)
    for depth, (table, before) in enumerate(zip(gained.levels, codebook.levels, strict=True), 1):
        assert table == pytest.approx(before * (1 + depth / 10) ** exponent, rel=1e-6)
        assert table.dtype == np.float32
        assert (np.diff(table) > 0).all()
    assert (gained.scale_table == codebook.scale_table).all()
    assert (gained.depth_thresholds == codebook.depth_thresholds).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_full_gain_undoes_the_shrinkage_of_a_fitted_table(depth: int) -> None:
    """For Lloyd–Max levels ⟨w, wq⟩ = ⟨wq, wq⟩ < ⟨w, w⟩; with the gain ⟨w, wq⟩ = ⟨w, w⟩."""
    x = (np.arange(HISTOGRAM_BINS) + 0.5) * HISTOGRAM_LIMIT / HISTOGRAM_BINS
    density = np.exp(-(x**2) / 2)
    levels = fit_levels(LevelHistogram(density), depth)
    codes = np.searchsorted(boundaries(levels), x)  # chosen with the unscaled levels
    quantized = levels[codes].astype(np.float64)
    energy, projection = np.zeros(9), np.zeros(9)
    energy[depth], projection[depth] = density @ x**2, density @ (x * quantized)
    assert projection[depth] == pytest.approx(density @ quantized**2, rel=1e-3)
    assert projection[depth] < 0.97 * energy[depth]
    tables = list(Codebook.default().levels)
    tables[depth - 1] = levels
    before = Codebook.default()
    codebook = Codebook(before.scale_table, before.depth_thresholds, tuple(tables))
    gained = with_gain(codebook, shrinkage_ratios([energy], [projection]), 1.0)
    assert density @ (x * gained.levels[depth - 1][codes]) == pytest.approx(energy[depth], rel=1e-6)

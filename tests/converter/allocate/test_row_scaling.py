"""Row scales: chosen where they pay, divided out exactly, and worth their bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.clustering import Clustering, cluster_bounds, cluster_rows
from cvxq_converter.allocate.row_scaling import (
    STEPS_PER_OCTAVE,
    WIDEST,
    RowScales,
    _unlikeness,
    choose_row_scales,
)
from cvxq_format import row_scale_factors
from hypothesis import given
from hypothesis import strategies as st


def one_cluster(rows: int) -> Clustering:
    return cluster_rows(np.ones(rows), np.ones(rows), rows, 1)


def test_rows_alike_need_no_scales() -> None:
    found = choose_row_scales(np.full(64, 0.3), 4096, one_cluster(64))
    assert found.bits == 0
    weight = torch.randn(64, 8)
    assert found.normalize(weight) is weight


def test_unlike_rows_are_told_apart_to_a_quarter_octave() -> None:
    sizes = np.exp2(-np.arange(16) / STEPS_PER_OCTAVE)
    found = choose_row_scales(sizes**2, 4096, one_cluster(16))
    assert found.bits == 4
    assert found.codes.tolist() == list(range(16))
    assert found.factors() == pytest.approx(sizes, rel=1e-6)
    normalized = found.normalize(torch.from_numpy(sizes[:, None]).float().expand(16, 3))
    torch.testing.assert_close(normalized, torch.ones(16, 3))


def test_scales_are_coarser_where_a_row_has_few_weights() -> None:
    sizes = np.exp2(-np.arange(64) / 16)
    bits = [choose_row_scales(sizes**2, K, one_cluster(64)).bits for K in (4, 32, 4096)]
    assert bits == sorted(bits)
    assert bits[0] == 0
    assert bits[-1] >= 4


def test_rows_sorted_into_clusters_of_their_own_need_none() -> None:
    mean_square = np.repeat([1.0, 1e-4], 8)
    clustering = cluster_rows(mean_square, np.ones(16), 8, 1)
    assert choose_row_scales(mean_square, 64, clustering).bits == 0


@given(st.integers(0, 1 << 32), st.integers(1, 40), st.integers(1, 12))
def test_what_is_chosen_costs_no_more_than_nothing(seed: int, rows: int, group: int) -> None:
    rng = np.random.default_rng(seed)
    mean_square = np.exp(rng.normal(0, 2, rows)) * (rng.random(rows) > 0.1)
    clustering = cluster_rows(mean_square, np.exp(rng.normal(0, 2, rows)), group, 1)
    found = choose_row_scales(mean_square, 64, clustering)
    assert (found.codes < 1 << found.bits).all()
    assert found.bits <= WIDEST
    used = mean_square > 0
    if not used.any():
        assert found.bits == 0
        return
    with np.errstate(divide="ignore"):
        octaves = np.log2(mean_square) / 2
    rest = octaves - np.log2(row_scale_factors(found.codes))
    before, after = _unlikeness(octaves, clustering), _unlikeness(rest, clustering)
    assert found.bits / 64 + after <= before + 1e-6


def test_mean_squares_are_those_of_each_clusters_rows() -> None:
    clustering = cluster_rows(np.array([3.0, 1.0, 2.0, 4.0, 5.0]), np.ones(5), 2, 1)
    scales = RowScales(np.array([0, 4, 8, 0, 4], np.uint8), 4)
    assert clustering.bounds.tolist() == cluster_bounds(5, 2, 1).tolist()
    # rows by size: 1 2 | 0 3 | 4, factors ½ ¼ | 1 1 | ½
    assert scales.mean_squares(clustering) == pytest.approx([(1 / 4 + 1 / 16) / 2, 1, 1 / 4])

"""Rows → clusters → groups: who sits with whom, and what a row counts for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.clustering import (
    Clustering,
    choose_partitions,
    cluster_bounds,
    cluster_rows,
    group_moments,
    row_weights,
)
from hypothesis import given
from hypothesis import strategies as st


def test_rows_are_sorted_by_variance_times_sensitivity_inside_each_partition() -> None:
    variance = np.array([4.0, 1.0, 2.0, 0.0, 1.0, 8.0, 1.0, 1.0])
    sensitivity = np.array([1.0, 1.0, 4.0, 9.0, 1.0, 1.0, 2.0, 1.0])
    found = cluster_rows(variance, sensitivity, group_size=2, partitions=2)
    # products: 4 1 8 0 | 1 8 2 1; the rows of a cluster keep their order
    assert found.permutation.tolist() == [1, 3, 0, 2, 4, 7, 5, 6]
    assert found.bounds.tolist() == [0, 2, 4, 6, 8]
    assert found.cluster_of_row().tolist() == [1, 0, 1, 0, 2, 3, 3, 2]
    assert found.is_permuted


def test_rows_already_in_order_need_no_permutation() -> None:
    assert not cluster_rows(np.arange(1.0, 7.0), np.ones(6), 2, 2).is_permuted


def test_the_last_cluster_of_each_partition_takes_the_remainder() -> None:
    assert cluster_bounds(rows=14, group_size=3, partitions=2).tolist() == [0, 3, 6, 7, 10, 13, 14]
    found = cluster_rows(np.ones(14), np.ones(14), 3, 2)
    assert found.cluster_rows.tolist() == [3, 3, 1, 3, 3, 1]
    assert found.clusters == 6


def test_rows_that_partitions_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="10 rows cannot be cut into 4 equal partitions"):
        cluster_rows(np.ones(10), np.ones(10), 2, 4)


@pytest.mark.parametrize(
    ("rows", "group_size", "wanted", "expected"),
    [
        (4096, 64, 8, 8),
        (2048, 64, 8, 8),  # exactly four groups each
        (2040, 64, 8, 4),  # 255 rows would be less than four groups
        (400, 10, 8, 8),
        (420, 10, 8, 4),  # 8 does not divide
        (256, 64, 8, 1),
        (7, 64, 8, 1),
        (1030, 64, 8, 2),
        (4096, 64, 1, 1),
        (96, 4, 3, 3),
    ],
)
def test_partitions_are_halved_until_each_holds_four_groups(
    rows: int, group_size: int, wanted: int, expected: int
) -> None:
    assert choose_partitions(rows, group_size, wanted) == expected


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Variances and sensitivities of rows, a group size and a number of partitions."""
    partitions = draw(st.integers(1, 4))
    rows = partitions * draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    variance, sensitivity = np.exp(rng.normal(0, 3, (2, rows)))
    return variance, sensitivity, draw(st.integers(1, 8)), partitions


@given(matrices())
def test_no_row_leaves_its_partition(case: Any) -> None:
    variance, sensitivity, group_size, partitions = case
    found = cluster_rows(variance, sensitivity, group_size, partitions)
    part = len(variance) // partitions
    assert sorted(found.permutation) == list(range(len(variance)))
    assert (found.permutation // part == np.arange(len(variance)) // part).all()
    assert set(np.arange(0, len(variance), part)) <= set(found.bounds)  # nor does a cluster cross
    assert found.cluster_rows.min() >= 1
    assert found.cluster_rows.max() <= group_size


@given(matrices(), st.integers(0, 1 << 32))
def test_clusters_do_not_depend_on_the_order_of_rows(case: Any, seed: int) -> None:
    variance, sensitivity, group_size, partitions = case
    part = len(variance) // partitions
    rng = np.random.default_rng(seed)
    shuffle = np.concatenate([p * part + rng.permutation(part) for p in range(partitions)])
    plain = cluster_rows(variance, sensitivity, group_size, partitions)
    mixed = cluster_rows(variance[shuffle], sensitivity[shuffle], group_size, partitions)
    assert (mixed.cluster_of_row() == plain.cluster_of_row()[shuffle]).all()


@given(matrices())
def test_within_a_partition_no_cluster_is_worth_more_than_the_next(case: Any) -> None:
    variance, sensitivity, group_size, partitions = case
    found = cluster_rows(variance, sensitivity, group_size, partitions)
    worth = (np.log2(variance) + np.log2(sensitivity))[found.permutation]
    lowest, highest = (f.reduceat(worth, found.bounds[:-1]) for f in (np.minimum, np.maximum))
    lowest, highest = lowest.reshape(partitions, -1), highest.reshape(partitions, -1)
    assert (highest[:, :-1] <= lowest[:, 1:]).all()
    for first, last in pairwise(found.bounds):
        assert (np.diff(found.permutation[first:last]) > 0).all()


def by_hand() -> Clustering:
    """Stored rows 2 0 | 1: one cluster of two rows and one of one."""
    return Clustering(np.array([2, 0, 1]), np.array([0, 2, 3]), group_size=2, partitions=1)


def test_row_weights_are_sensitivities_over_their_clusters_mean() -> None:
    weights = row_weights(np.array([3.0, 7.0, 1.0]), by_hand())
    assert weights.tolist() == [0.5, 1.5, 1.0]  # stored order
    assert weights.dtype == np.float32


def test_group_moments_by_hand() -> None:
    weight = torch.tensor([[2.0, -4.0], [3.0, 5.0], [6.0, 4.0]])
    clustering = by_hand()
    plain = group_moments(weight, clustering, np.ones(3, np.float32))
    assert plain[0].tolist() == [[4.0, 0.0], [3.0, 5.0]]
    assert plain[1].tolist() == [[20.0, 16.0], [9.0, 25.0]]
    weighted = group_moments(weight, clustering, np.array([0.5, 1.5, 1.0], np.float32))
    assert weighted[0].tolist() == [[3.0, -2.0], [3.0, 5.0]]
    assert weighted[1].tolist() == [[12.0, 16.0], [9.0, 25.0]]

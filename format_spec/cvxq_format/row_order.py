"""The order of the stored rows on disk: as row numbers, or as the cluster that each row lies in.

In memory the order is a permutation either way. Rows that ascend inside every cluster need no more
than a cluster map: ⌈log2(clusters of a partition)⌉ bits per row in place of ⌈log2(rows)⌉.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cvxq_format.geometry import Geometry

Rows = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.unsignedinteger]


class Coding(NamedTuple):
    """One way to store an order: a permutation (E, R) to the numbers stored, (E, R), and back.

    `rows` raises ValueError if the numbers stand for no permutation.
    """

    values: Callable[[Rows, Geometry], Rows]
    rows: Callable[[Numbers, Geometry], Rows]


def _numbers_of_rows(permutation: Rows, geometry: Geometry) -> Rows:
    """Return each row's number inside its partition."""
    return permutation % geometry.partition_rows


def _rows_of_numbers(numbers: Numbers, geometry: Geometry) -> Rows:
    """Return the permutation; raises ValueError if a row is missing."""
    inside = numbers.astype(np.int64).reshape(-1, geometry.partitions, geometry.partition_rows)
    if inside.max() >= geometry.partition_rows:
        raise ValueError(
            f"permutation entry {inside.max()}, a partition has {geometry.partition_rows} rows"
        )
    permutation = _across_partitions(inside, geometry)
    _check_complete(permutation, geometry)
    return permutation


def _clusters_of_rows(permutation: Rows, geometry: Geometry) -> Rows:
    """Return the number, inside its partition, of the cluster of each row in the rows' order."""
    clusters, _ = geometry.locate(np.arange(geometry.rows))
    numbers = np.empty(permutation.shape, np.int64)
    np.put_along_axis(
        numbers, permutation, clusters[None] % geometry.clusters_per_partition, axis=1
    )
    return numbers


def _rows_of_clusters(numbers: Numbers, geometry: Geometry) -> Rows:
    """Return the permutation that a cluster map stands for.

    Raises ValueError if a cluster is named more or less often than it has rows.
    """
    several = geometry.clusters_per_partition
    # Numpy sorts keys of up to 16 bits by radix.
    numbers = numbers.astype(np.min_scalar_type(several), copy=False)
    numbers = numbers.reshape(-1, geometry.partitions, geometry.partition_rows)
    if numbers.max() >= several:
        raise ValueError(f"cluster map entry {numbers.max()}, a partition has {several} clusters")
    order = np.argsort(numbers, axis=2, kind="stable")
    expected = (np.arange(geometry.partition_rows) // geometry.group_size).astype(numbers.dtype)
    wrong = np.take_along_axis(numbers, order, axis=2) != expected
    if wrong.any():
        _refuse_counts(numbers, wrong, geometry)
    return _across_partitions(order, geometry)


def _refuse_counts(numbers: Numbers, wrong: npt.NDArray[np.bool_], geometry: Geometry) -> None:
    """Raise ValueError for the first cluster that a map names too often or too rarely."""
    expert, partition, _ = np.unravel_index(int(wrong.argmax()), wrong.shape)
    named = np.bincount(
        numbers[expert, partition].astype(np.int64), minlength=geometry.clusters_per_partition
    )
    rows = geometry.cluster_rows()[: geometry.clusters_per_partition]
    cluster = int(np.flatnonzero(named != rows)[0])
    raise ValueError(
        f"cluster map names cluster {partition * rows.size + cluster} of expert {expert} "
        f"for {named[cluster]} rows, it has {rows[cluster]}"
    )


PERMUTATION = Coding(_numbers_of_rows, _rows_of_numbers)
CLUSTER_MAP = Coding(_clusters_of_rows, _rows_of_clusters)


def _across_partitions(inside: Rows, geometry: Geometry) -> Rows:
    """Turn row numbers inside partitions (E, P, R/P), in place, to those of the matrix (E, R)."""
    inside += np.arange(geometry.partitions, dtype=np.int64)[:, None] * geometry.partition_rows
    return inside.reshape(geometry.experts, geometry.rows)


def check_permutation(permutation: Rows, geometry: Geometry) -> None:
    """Raise ValueError unless each row (E, R) occurs once, in its own partition."""
    first = np.arange(geometry.rows) // geometry.partition_rows
    if np.any(permutation // geometry.partition_rows != first):
        raise ValueError("permutation crosses a partition")
    _check_complete(permutation, geometry)


def _check_complete(permutation: Rows, geometry: Geometry) -> None:
    seen = np.zeros((geometry.experts, geometry.rows), np.bool_)
    np.put_along_axis(seen, permutation, True, axis=1)
    if not seen.all():
        missing = int(np.flatnonzero(~seen)[0])
        raise ValueError(f"permutation leaves out row {missing % geometry.rows}")


def check_ascending(permutation: Rows, geometry: Geometry) -> None:
    """Raise ValueError unless the rows of every cluster ascend, as a cluster map needs."""
    clusters, _ = geometry.locate(np.arange(geometry.rows))
    descends = (np.diff(permutation, axis=1) < 0) & (np.diff(clusters) == 0)
    if descends.any():
        _, position = np.unravel_index(int(descends.argmax()), descends.shape)
        raise ValueError(
            f"rows of cluster {clusters[position]} do not ascend, a cluster map needs them to"
        )

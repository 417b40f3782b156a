"""The order of the stored rows on disk: as row numbers, or as the cluster that each row lies in.

In memory the order is a permutation either way. Rows that ascend inside every cluster need no more
than a cluster map: ⌈log2(clusters of a partition)⌉ bits per row in place of ⌈log2(rows)⌉.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cvxq_format import bits
from cvxq_format.geometry import Geometry

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


def pack_permutation(permutation: Rows, geometry: Geometry) -> Bytes:
    """Return the stream of a permutation (E, R): each row's number inside its partition."""
    return bits.pack_bits(permutation % geometry.partition_rows, geometry.permutation_bits)


def unpack_permutation(stream: Bytes, geometry: Geometry) -> Rows:
    """Return the permutation (E, R); raises ValueError if a row is missing."""
    count = geometry.experts * geometry.rows
    entries = bits.unpack_bits(stream, count, geometry.permutation_bits)
    inside = entries.astype(np.int64).reshape(-1, geometry.partitions, geometry.partition_rows)
    if inside.max() >= geometry.partition_rows:
        raise ValueError(
            f"permutation entry {inside.max()}, a partition has {geometry.partition_rows} rows"
        )
    permutation = _across_partitions(inside, geometry)
    _check_complete(permutation, geometry)
    return permutation


def pack_cluster_map(permutation: Rows, geometry: Geometry) -> Bytes:
    """Return the stream of cluster numbers, inside their partition, of the rows in their order."""
    clusters, _ = geometry.locate(np.arange(geometry.rows))
    numbers = np.empty(permutation.shape, np.int64)
    np.put_along_axis(
        numbers, permutation, clusters[None] % geometry.clusters_per_partition, axis=1
    )
    return bits.pack_bits(numbers, geometry.cluster_map_bits)


def unpack_cluster_map(stream: Bytes, geometry: Geometry) -> Rows:
    """Return the permutation (E, R) that a cluster map stands for.

    Raises ValueError if a cluster is named more or less often than it has rows.
    """
    count = geometry.experts * geometry.rows
    several = geometry.clusters_per_partition
    entries = bits.unpack_bits(stream, count, geometry.cluster_map_bits)
    # Numpy sorts keys of up to 16 bits by radix.
    numbers = entries.astype(np.min_scalar_type(several), copy=False)
    numbers = numbers.reshape(-1, geometry.partitions, geometry.partition_rows)
    if numbers.max() >= several:
        raise ValueError(f"cluster map entry {numbers.max()}, a partition has {several} clusters")
    order = np.argsort(numbers, axis=2, kind="stable")
    expected = (np.arange(geometry.partition_rows) // geometry.group_size).astype(numbers.dtype)
    wrong = np.take_along_axis(numbers, order, axis=2) != expected
    if wrong.any():
        _refuse_counts(numbers, wrong, geometry)
    return _across_partitions(order, geometry)


def _refuse_counts(
    numbers: npt.NDArray[np.unsignedinteger], wrong: npt.NDArray[np.bool_], geometry: Geometry
) -> None:
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

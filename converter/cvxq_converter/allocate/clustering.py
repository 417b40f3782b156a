"""Rows → clusters → groups.

The rows of a matrix (N, K) are sorted by how much a bit spent on them is worth and cut into
clusters of G rows. One cluster and one input column make a group: G weights that share a bit
depth and a scale. Rows are only ever sorted inside a row partition, so that a file can later be
split between devices at any partition border.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

DEFAULT_PARTITIONS = 8
LEAST_CLUSTERS = 4  # of full size in each row partition


@dataclass(frozen=True)
class Clustering:
    """How the rows of one matrix are grouped.

    permutation: (N,) int64, stored position → row; it never leaves a partition.
    bounds: (C + 1,) int64, cluster c holds the stored positions bounds[c] .. bounds[c + 1] − 1.
    """

    permutation: np.ndarray
    bounds: np.ndarray
    group_size: int
    partitions: int

    @property
    def clusters(self) -> int:
        return len(self.bounds) - 1

    @property
    def cluster_rows(self) -> np.ndarray:
        """(C,) int64 rows of each cluster."""
        return np.diff(self.bounds)

    @property
    def is_permuted(self) -> bool:
        return bool((self.permutation != np.arange(len(self.permutation))).any())

    def cluster_of_row(self) -> np.ndarray:
        """(N,) int64 cluster of each row, in source row order."""
        out = np.empty(len(self.permutation), dtype=np.int64)
        out[self.permutation] = np.repeat(np.arange(self.clusters), self.cluster_rows)
        return out


def choose_partitions(rows: int, group_size: int, wanted: int = DEFAULT_PARTITIONS) -> int:
    """The largest halving of `wanted` that divides `rows` into parts of at least four groups.

    With fewer there is hardly a row to sort: on 256 rows, four partitions of one group of 64 cost
    a third more KL than a single partition of four.
    """
    partitions = wanted
    while partitions > 1 and (
        rows % partitions or rows // partitions < LEAST_CLUSTERS * group_size
    ):
        partitions //= 2
    return partitions


def cluster_bounds(rows: int, group_size: int, partitions: int) -> np.ndarray:
    """(C + 1,) int64 stored positions where clusters begin; a partition's last may be short."""
    part = rows // partitions
    starts = np.arange(0, part, group_size)
    bounds = (np.arange(partitions)[:, None] * part + starts).reshape(-1)
    return np.append(bounds, rows)


def cluster_rows(
    row_variance: np.ndarray, row_sensitivity: np.ndarray, group_size: int, partitions: int
) -> Clustering:
    """Sort the rows of each partition by `log2 variance + log2 sensitivity` and cut.

    row_variance: (N,) mean squared weight of each row, in weight².
    row_sensitivity: (N,) mean squared gradient of each row, > 0.
    Rows without any weight sort first. Equal rows keep their order, and so do the rows of a
    cluster: among them it has no meaning, and need not be stored.
    """
    rows = len(row_variance)
    if rows % partitions:
        raise ValueError(f"{rows} rows cannot be cut into {partitions} equal partitions")
    with np.errstate(divide="ignore"):
        worth = np.log2(row_variance) + np.log2(row_sensitivity)
    part = rows // partitions
    order = np.argsort(worth.reshape(partitions, part), axis=1, kind="stable")
    permutation = (order + np.arange(partitions)[:, None] * part).reshape(-1).astype(np.int64)
    bounds = cluster_bounds(rows, group_size, partitions)
    for first, last in pairwise(bounds):
        permutation[first:last].sort()
    return Clustering(
        permutation=permutation,
        bounds=bounds,
        group_size=group_size,
        partitions=partitions,
    )


def row_weights(sensitivity: np.ndarray, clustering: Clustering) -> np.ndarray:
    """(N,) float32 sensitivity of each row over the mean of its cluster, in stored order.

    Rows of a cluster are alike, but not equal: a cluster of rare tokens may hold one that starts
    every document. With these weights an error in such a row counts for what it costs.
    """
    stored = sensitivity[clustering.permutation]
    mean = np.add.reduceat(stored, clustering.bounds[:-1]) / clustering.cluster_rows
    return (stored / np.repeat(mean, clustering.cluster_rows)).astype(np.float32)


def group_moments(
    weight: torch.Tensor, clustering: Clustering, weights: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean and mean square of every group.

    weight: (N, K); weights: (N,) from `row_weights`. Returns (mean, mean square), (C, K) float64:
    squares of very small or large weights would leave the range of float32.
    """
    permutation = torch.from_numpy(clustering.permutation).to(weight.device)
    means, squares = [], []
    for start, end in pairwise(clustering.bounds):
        block = weight[permutation[start:end]].double()
        share = torch.from_numpy(weights[start:end]).to(weight.device).double() / int(end - start)
        means.append(share @ block)
        squares.append(share @ block.square())
    return torch.stack(means), torch.stack(squares)

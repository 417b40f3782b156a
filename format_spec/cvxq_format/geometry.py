"""Where the rows, clusters and groups of one companded matrix lie.

The stored matrix has R rows and Kc columns per expert: W itself (outputs × inputs), or its
transpose. Its rows fall into P equal contiguous partitions, each partition into clusters of G
rows (the last may be shorter), and a group is one (cluster, column) pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvxq_format.limits import MAX_DEPTH


@dataclass(frozen=True)
class Geometry:
    """Counts that follow from shape, orientation, group size and partitions."""

    experts: int
    rows: int
    columns: int
    group_size: int
    partitions: int

    @classmethod
    def of(
        cls, shape: tuple[int, ...], group_size: int, partitions: int, transposed: bool
    ) -> Geometry:
        """Build the geometry of W (N, K) or (E, N, K); raises ValueError if it cannot exist."""
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"shape {list(shape)}, allowed [N, K] or [E, N, K], none zero")
        if group_size < 1:
            raise ValueError(f"group size {group_size}, allowed 1 or more")
        experts = shape[0] if len(shape) == 3 else 1
        rows, columns = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        if partitions < 1 or rows % partitions:
            raise ValueError(f"{partitions} partitions do not divide {rows} stored rows")
        if transposed and partitions != 1:
            raise ValueError(f"{partitions} partitions of a transposed matrix, allowed 1")
        return cls(experts, rows, columns, group_size, partitions)

    @property
    def partition_rows(self) -> int:
        return self.rows // self.partitions

    @property
    def clusters_per_partition(self) -> int:
        return -(-self.partition_rows // self.group_size)

    @property
    def clusters(self) -> int:
        return self.partitions * self.clusters_per_partition

    @property
    def groups(self) -> int:
        """Groups of all experts together."""
        return self.experts * self.clusters * self.columns

    @property
    def weights(self) -> int:
        """Weights of all experts together."""
        return self.experts * self.rows * self.columns

    def cluster_rows(self) -> npt.NDArray[np.int64]:
        """Return the rows in each cluster, (C,)."""
        one = np.full(self.clusters_per_partition, self.group_size, np.int64)
        one[-1] = self.partition_rows - self.group_size * (self.clusters_per_partition - 1)
        return np.tile(one, self.partitions)

    def cluster_starts(self) -> npt.NDArray[np.int64]:
        """Return the first stored row of each cluster and, last, R: (C + 1,)."""
        return np.concatenate([[0], np.cumsum(self.cluster_rows())])

    def locate(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (cluster, row inside it) of each stored row."""
        partition, inside = np.divmod(rows, self.partition_rows)
        cluster, position = np.divmod(inside, self.group_size)
        return partition * self.clusters_per_partition + cluster, position

    def code_sizes(self, depths: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Return the bytes of codes in each cluster, (E, C), for depths (E, C, Kc)."""
        planes = depths.sum(axis=2, dtype=np.int64)
        return planes * ((self.cluster_rows() + 7) // 8)


def depth_histogram(
    depths: npt.NDArray[np.uint8], cluster_rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the weights at each bit depth 0 … 8, (9,), for depths (…, C, Kc), rows (C,)."""
    rows = np.broadcast_to(cluster_rows[:, None], depths.shape)
    counts = np.bincount(depths.ravel(), rows.ravel(), minlength=MAX_DEPTH + 1)
    return counts.astype(np.int64)  # from float64, exact up to 2^53 weights

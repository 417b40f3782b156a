"""One companded matrix: its side information, decoded, and its codes, still packed.

`CompandedTensor` is what the converter fills in, the writer stores and the reader returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cvxq_format.codebook import Codebook
from cvxq_format.geometry import Geometry
from cvxq_format.payload import Layout
from cvxq_format.row_scales import row_scale_factors

Bytes = npt.NDArray[np.uint8]

_ZERO = np.float32(0)


@dataclass(frozen=True, eq=False)
class CompandedTensor:
    """A matrix as codes, depths, scales and means; E experts, C clusters, R × Kc stored.

    shape: (N, K) or (E, N, K) of W, always outputs × inputs; stored as W, or Wᵀ if `transposed`.
    codebook: index of the file's codebook. scale_unit, mean_step: float32, finite, ≥ 0.
    depths: (E, C, Kc) uint8, 0…8. scale_codes: (E, C, Kc) uint8, below 2^scale_bits.
    packed_codes: (bytes,) uint8, the bit planes that `pack_codes` makes.
    column_terms (E, Kc) uint8 and cluster_terms (E, C) int16: present if depths are separable.
    mean_codes: (E, C, Kc) int8 or None. permutation: (E, R) int64 or None; entry s is the row of
    the stored matrix that lies at stored position s, inside the same partition. cluster_map: store
    the permutation as one, which takes rows that ascend inside each cluster.
    row_scale_codes: (E, N) uint8 or None, below 2^row_scale_bits: the factor 2^(−code/4) of each
    output in source order; never with `transposed`. row_scale_bits: 1…8, or 0 without them.
    """

    shape: tuple[int, ...]
    group_size: int
    partitions: int
    scale_unit: np.float32
    depths: Bytes
    scale_codes: Bytes
    packed_codes: Bytes
    mean_step: np.float32 = _ZERO
    mean_codes: npt.NDArray[np.int8] | None = None
    permutation: npt.NDArray[np.int64] | None = None
    column_terms: Bytes | None = None
    cluster_terms: npt.NDArray[np.int16] | None = None
    column_bits: int = 0
    column_shift: int = 0
    scale_bits: int = 6
    transposed: bool = False
    source_orientation: str = "out_in"
    codebook: int = 0
    cluster_map: bool = False
    row_scale_codes: Bytes | None = None
    row_scale_bits: int = 0

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.of(self.shape, self.group_size, self.partitions, self.transposed)

    @property
    def experts(self) -> int:
        return self.geometry.experts

    @property
    def rows(self) -> int:
        """R, rows of the stored matrix."""
        return self.geometry.rows

    @property
    def columns(self) -> int:
        """Kc, columns of the stored matrix."""
        return self.geometry.columns

    @property
    def clusters(self) -> int:
        return self.geometry.clusters

    def cluster_rows(self) -> npt.NDArray[np.int64]:
        """Return the rows in each cluster, (C,)."""
        return self.geometry.cluster_rows()

    @cached_property
    def code_starts(self) -> npt.NDArray[np.int64]:
        """First byte of each cluster's codes in `packed_codes` and, last, the end: (E·C + 1,)."""
        sizes = self.geometry.code_sizes(self.depths).reshape(-1)
        return np.concatenate([[0], np.cumsum(sizes)])

    def stored_to_source(self, expert: int = 0) -> npt.NDArray[np.int64]:
        """Return the stored matrix's row at each stored position, (R,)."""
        if self.permutation is None:
            return np.arange(self.rows)
        return self.permutation[expert]

    @cached_property
    def source_to_stored(self) -> npt.NDArray[np.int64]:
        """Stored position of each row of the stored matrix, (E, R)."""
        identity = np.broadcast_to(np.arange(self.rows), (self.experts, self.rows))
        if self.permutation is None:
            return np.ascontiguousarray(identity)
        inverse = np.empty((self.experts, self.rows), np.int64)
        np.put_along_axis(inverse, self.permutation, identity, axis=1)
        return inverse

    @property
    def is_separable(self) -> bool:
        return self.column_terms is not None

    @property
    def has_cluster_map(self) -> bool:
        """True if the payload holds a cluster map; with one cluster per partition it is empty."""
        return self.cluster_map and self.geometry.clusters_per_partition > 1

    @property
    def is_permuted(self) -> bool:
        """True if the payload says in which order the rows are stored."""
        return self.permutation is not None and self.cluster_map == self.has_cluster_map

    @cached_property
    def layout(self) -> Layout:
        """Which blocks the payload has."""
        return Layout(
            geometry=self.geometry,
            scale_bits=self.scale_bits,
            column_bits=self.column_bits,
            separable=self.is_separable,
            means=self.mean_codes is not None,
            permuted=self.is_permuted,
            cluster_map=self.has_cluster_map,
            row_scale_bits=self.row_scale_bits,
        )

    @property
    def payload_size(self) -> int:
        """Bytes of the payload: side information and codes."""
        return self.layout.side_bytes + int(self.packed_codes.size)

    def scales(self, codebook: Codebook, groups: Any = ...) -> npt.NDArray[np.float32]:
        """Return S of every group, (E, C, Kc) float32: scale_unit · scale_table[scale code].

        groups: an index into (E, C, Kc), here and below; the result has the shape it picks.
        """
        return (np.float32(self.scale_unit) * codebook.scale_table).take(self.scale_codes[groups])

    def relative_means(self, groups: Any = ...) -> npt.NDArray[np.float32] | None:
        """Return t of every group in units of its scale, (E, C, Kc) float32, if stored."""
        if self.mean_codes is None:
            return None
        return self.mean_codes[groups].astype(np.float32) * np.float32(self.mean_step)

    def row_scales(self, outputs: Any = ...) -> npt.NDArray[np.float32] | None:
        """Return the factor of each output, (E, N) float32 in source order, if stored.

        outputs: an index into (E, N); the result has the shape it picks.
        """
        if self.row_scale_codes is None:
            return None
        return row_scale_factors(self.row_scale_codes[outputs])

    def cut(self, along: Literal["rows", "columns"], rank: int, size: int) -> CompandedTensor:
        """Return part `rank` of `size` equal ones of W: of its rows (outputs) or columns (inputs).

        The parts, dequantized and joined, are the whole bit for bit.  Stored rows are cut between
        partitions, stored columns anywhere.
        Raises ValueError for a part that cannot be: `size` has to divide what is cut.
        """
        whole = self.partitions if self._are_stored_rows(along) else self.columns
        if not 0 <= rank < size or whole % size:
            kind = "partitions" if self._are_stored_rows(along) else "stored columns"
            raise ValueError(
                f"part {rank} of {size} of the {along} of a matrix {list(self.shape)}: it has "
                f"{whole} {kind}, which the number of parts has to divide"
            )
        each = self.shape[-2 if along == "rows" else -1] // size
        return self.part(along, rank * each, (rank + 1) * each)

    def part(self, along: Literal["rows", "columns"], start: int, stop: int) -> CompandedTensor:
        """Return rows (outputs) or columns (inputs) `start` to `stop` of W, equal bit for bit.

        Raises ValueError for none, and for stored rows that are not whole partitions.
        """
        axis = -2 if along == "rows" else -1
        of_rows = self._are_stored_rows(along)
        step = self.geometry.partition_rows if of_rows else 1
        if not 0 <= start < stop <= self.shape[axis] or start % step or stop % step:
            raise ValueError(
                f"{along} {start} to {stop} of a matrix {list(self.shape)}, allowed multiples of "
                f"{step}, at least {step} in all"
            )
        shape = list(self.shape)
        shape[axis] = stop - start
        rows, columns = slice(0, self.rows), slice(start, stop)
        clusters = slice(0, self.clusters)
        if of_rows:
            rows, columns = columns, slice(0, self.columns)
            each = self.geometry.clusters_per_partition
            clusters = slice(start // step * each, stop // step * each)
        groups = (slice(None), clusters, columns)
        is_kept = np.zeros(self.depths.shape, np.bool_)
        is_kept[groups] = True
        octets = (self.cluster_rows() + 7) // 8
        group_bytes = self.depths * octets[:, None]
        row_scales = self.row_scale_codes
        return replace(
            self,
            shape=tuple(shape),
            partitions=(stop - start) // step if of_rows else self.partitions,
            depths=np.ascontiguousarray(self.depths[groups]),
            scale_codes=np.ascontiguousarray(self.scale_codes[groups]),
            mean_codes=_taken(self.mean_codes, groups),
            packed_codes=self.packed_codes[np.repeat(is_kept.reshape(-1), group_bytes.reshape(-1))],
            permutation=None
            if self.permutation is None
            else self.permutation[:, rows] - rows.start,
            column_terms=_taken(self.column_terms, (slice(None), columns)),
            cluster_terms=_taken(self.cluster_terms, (slice(None), clusters)),
            row_scale_codes=_taken(row_scales, (slice(None), rows)) if of_rows else row_scales,
        )

    def _are_stored_rows(self, along: Literal["rows", "columns"]) -> bool:
        return (along == "rows") != self.transposed


def _taken(values: npt.NDArray[Any] | None, groups: tuple[slice, ...]) -> npt.NDArray[Any] | None:
    return None if values is None else np.ascontiguousarray(values[groups])

"""One companded matrix: its side information, decoded, and its codes, still packed.

`CompandedTensor` is what the converter fills in, the writer stores and the reader returns. The
payload on disk is a fixed sequence of blocks (FORMAT.md, "Companded payload"); `from_payload` and
`to_bytes` are that sequence, read and written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cvxq_format import bits, row_order
from cvxq_format.checks import check_spare_rows, check_tensor, check_values
from cvxq_format.codebook import Codebook
from cvxq_format.entries import CompandedEntry
from cvxq_format.errors import CorruptError
from cvxq_format.geometry import Geometry
from cvxq_format.limits import MAX_DEPTH
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

    @property
    def payload_size(self) -> int:
        """Bytes of the payload: side information and codes."""
        side = self.geometry.side_size(
            self.scale_bits,
            self.column_bits,
            self.mean_codes is not None,
            self.is_permuted,
            self.is_separable,
            cluster_map=self.has_cluster_map,
            row_scale_bits=self.row_scale_bits,
        )
        return side + int(self.packed_codes.size)

    def scales(self, codebook: Codebook) -> npt.NDArray[np.float32]:
        """Return S of every group, (E, C, Kc) float32: scale_unit · scale_table[scale code]."""
        return (np.float32(self.scale_unit) * codebook.scale_table)[self.scale_codes]

    def relative_means(self) -> npt.NDArray[np.float32] | None:
        """Return t of every group in units of its scale, (E, C, Kc) float32, if stored."""
        if self.mean_codes is None:
            return None
        return self.mean_codes.astype(np.float32) * np.float32(self.mean_step)

    def row_scales(self) -> npt.NDArray[np.float32] | None:
        """Return the factor of each output, (E, N) float32 in source order, if stored."""
        if self.row_scale_codes is None:
            return None
        return row_scale_factors(self.row_scale_codes)

    def to_bytes(self) -> bytes:
        """Return the payload; raises WriteError if the fields contradict each other."""
        check_tensor(self)
        parts = [np.array([self.scale_unit, self.mean_step], "<f4").view(np.uint8)]
        if self.column_terms is not None and self.cluster_terms is not None:
            parts.append(bits.pack_bits(self.column_terms, self.column_bits))
            parts.append(np.ascontiguousarray(self.cluster_terms, "<i2").reshape(-1).view(np.uint8))
        else:
            parts.append(bits.pack_bits(self.depths, 4))
        parts.append(bits.pack_bits(self.scale_codes, self.scale_bits))
        if self.mean_codes is not None:
            parts.append(np.ascontiguousarray(self.mean_codes).reshape(-1).view(np.uint8))
        if self.permutation is not None and self.is_permuted:
            pack = row_order.pack_cluster_map if self.cluster_map else row_order.pack_permutation
            parts.append(pack(self.permutation, self.geometry))
        if self.row_scale_codes is not None:
            parts.append(bits.pack_bits(self.row_scale_codes, self.row_scale_bits))
        parts.append(self.packed_codes)
        return b"".join(part.tobytes() for part in parts)

    @classmethod
    def from_payload(
        cls, entry: CompandedEntry, payload: memoryview | bytes | Bytes, codebook: Codebook
    ) -> CompandedTensor:
        """Parse and check a payload; `packed_codes` stays a view of it.

        Raises CorruptError, naming the tensor, if sizes, depths, permutation or spare bits break
        the format. Memory: about 64 bytes per byte of payload at the very worst.
        """
        data = np.frombuffer(payload, np.uint8)
        try:
            return _parse(entry, data, codebook)
        except ValueError as error:
            if isinstance(error, CorruptError):
                raise
            raise CorruptError(_where(entry, str(error))) from error


def _where(entry: CompandedEntry, text: str) -> str:
    return f"tensor {entry.name!r} at byte {entry.offset:#x}: {text}; the file is corrupt"


def _parse(entry: CompandedEntry, data: Bytes, codebook: Codebook) -> CompandedTensor:
    geometry = entry.geometry
    shape = (geometry.experts, geometry.clusters, geometry.columns)
    side = geometry.side_size(
        codebook.scale_bits,
        entry.column_bits,
        entry.means,
        entry.permuted,
        entry.separable,
        cluster_map=entry.cluster_map,
        row_scale_bits=entry.row_scale_bits,
    )
    if side > data.size:
        raise ValueError(f"payload of {data.size} bytes, side information alone needs {side}")
    position = 0

    def take(size: int) -> Bytes:
        nonlocal position
        position += size
        return data[position - size : position]

    def take_stream(count: int, width: int) -> npt.NDArray[np.unsignedinteger]:
        return bits.unpack_bits(take(bits.stream_size(count, width)), count, width)

    scale_unit, mean_step = take(8).copy().view("<f4").astype(np.float32)
    column_terms = cluster_terms = None
    if entry.separable:
        column_terms = take_stream(geometry.experts * geometry.columns, entry.column_bits)
        column_terms = column_terms.astype(np.uint8).reshape(geometry.experts, geometry.columns)
        count = geometry.experts * geometry.clusters
        cluster_terms = take(2 * count).copy().view("<i2").astype(np.int16)
        cluster_terms = cluster_terms.reshape(geometry.experts, geometry.clusters)
        depths = codebook.depths_of(column_terms, cluster_terms, entry.column_shift)
    else:
        depths = take_stream(geometry.groups, 4).astype(np.uint8).reshape(shape)
        if depths.max() > MAX_DEPTH:
            raise ValueError(f"bit depth {depths.max()}, allowed 0 to {MAX_DEPTH}")
    scale_codes = take_stream(geometry.groups, codebook.scale_bits).astype(np.uint8).reshape(shape)
    mean_codes = take(geometry.groups).view(np.int8).reshape(shape) if entry.means else None
    permutation = None
    if entry.permuted:
        width = geometry.cluster_map_bits if entry.cluster_map else geometry.permutation_bits
        stream = take(bits.stream_size(geometry.experts * geometry.rows, width))
        unpack = row_order.unpack_cluster_map if entry.cluster_map else row_order.unpack_permutation
        permutation = unpack(stream, geometry)
    row_scale_codes = None
    if entry.row_scale_bits:
        row_scale_codes = take_stream(geometry.experts * geometry.rows, entry.row_scale_bits)
        row_scale_codes = row_scale_codes.astype(np.uint8).reshape(geometry.experts, geometry.rows)
    codes = data[side:]
    expected = int(geometry.code_sizes(depths).sum())
    if codes.size != expected:
        raise ValueError(f"{codes.size} bytes of codes, the bit depths need {expected}")
    tensor = CompandedTensor(
        shape=entry.shape,
        group_size=entry.group_size,
        partitions=entry.partitions,
        scale_unit=np.float32(scale_unit),
        depths=depths,
        scale_codes=scale_codes,
        packed_codes=codes,
        mean_step=np.float32(mean_step),
        mean_codes=mean_codes,
        permutation=permutation,
        column_terms=column_terms,
        cluster_terms=cluster_terms,
        column_bits=entry.column_bits,
        column_shift=entry.column_shift,
        scale_bits=codebook.scale_bits,
        transposed=entry.transposed,
        source_orientation=entry.source_orientation,
        codebook=entry.codebook,
        cluster_map=entry.cluster_map,
        row_scale_codes=row_scale_codes,
        row_scale_bits=entry.row_scale_bits,
    )
    check_values(tensor, codebook)
    check_spare_rows(tensor)
    return tensor

"""Codes as bit planes: the one packing that is byte-aligned at every bit depth.

A group of n codes at depth B is stored as B planes of ⌈n/8⌉ bytes; bit j mod 8 of byte j div 8 of
plane b is bit b of row j's code. Groups follow each other column by column, cluster by cluster.

Both directions treat eight neighbouring columns as one 64-bit word. Bit b of row j must travel
between bit b of the code's byte and bit j mod 8 of the plane's byte, within the same byte of the
word, so one shift by their difference and one mask move eight bits at a time; what a shift drags
across a byte border the mask removes. The remaining work is one transpose of packed bytes.
Work goes in chunks that stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvxq_format.geometry import Geometry

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

_ONES = 0x0101010101010101
_CHUNK_CODES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Clusters first…last − 1, `rows` rows each from stored row `row`, columns left…right − 1."""

    first: int
    last: int
    left: int
    right: int
    rows: int
    row: int

    @property
    def row_slice(self) -> slice:
        return slice(self.row, self.row + (self.last - self.first) * self.rows)


def chunks(geometry: Geometry, clusters: range) -> Iterator[Chunk]:
    """Cut consecutive clusters into chunks, in the order of their bytes in the payload."""
    rows = geometry.cluster_rows()
    starts = geometry.cluster_starts()
    first = clusters.start
    while first < clusters.stop:
        n = int(rows[first])
        most = max(1, _CHUNK_CODES // (n * geometry.columns))
        different = np.flatnonzero(rows[first : min(clusters.stop, first + most)] != n)
        last = min(clusters.stop, first + (int(different[0]) if different.size else most))
        width = geometry.columns if most > 1 else max(8, _CHUNK_CODES // n // 8 * 8)
        for left in range(0, geometry.columns, width):
            right = min(geometry.columns, left + width)
            yield Chunk(first, last, left, right, n, int(starts[first]))
        first = last


def pack_planes(codes: Bytes, depths: Bytes) -> Bytes:
    """Pack the codes (c, n, k) of clusters of equal size with depths (c, k) into bit planes."""
    clusters, rows, columns = codes.shape
    octets, words, top = -(-rows // 8), -(-columns // 8), int(depths.max(initial=0))
    whole = codes
    if rows % 8 or columns % 8 or codes.strides[2] != 1:
        whole = np.zeros((clusters, octets * 8, words * 8), np.uint8)
        whole[:, :rows, :columns] = codes
    source = whole.view("<u8").reshape(clusters, octets, 8, words)
    moved = np.empty((clusters, octets, words), "<u8")
    lanes = np.zeros((top, clusters, octets, words), "<u8")
    for bit in range(top):
        for j in range(8):
            _shift(source[:, :, j], j - bit, out=moved)
            np.bitwise_and(moved, np.uint64(_ONES << j), out=moved)
            np.bitwise_or(lanes[bit], moved, out=lanes[bit])
    by_octet = lanes.view(np.uint8).reshape(top, clusters, octets, words * 8)[..., :columns]
    by_group = np.ascontiguousarray(by_octet.transpose(1, 3, 0, 2)).reshape(-1, octets)
    stored = _stored_planes(depths, top)
    if stored.all():
        return by_group.reshape(-1)
    return np.compress(stored, by_group, axis=0).reshape(-1)


def unpack_planes(packed: Bytes, depths: Bytes, rows: int) -> Bytes:
    """Unpack clusters of `rows` rows each with depths (c, k); returns codes (c, rows, k) uint8."""
    clusters, columns = depths.shape
    octets, words, top = -(-rows // 8), -(-columns // 8), int(depths.max(initial=0))
    planes = packed.reshape(-1, octets)
    stored = _stored_planes(depths, top)
    if not stored.all():
        # A missing plane reads the last, zero, row.
        index = np.where(stored, np.cumsum(stored) - 1, planes.shape[0])
        planes = np.concatenate([planes, np.zeros((1, octets), np.uint8)])
        planes = np.take(planes, index, axis=0, mode="clip")
    lanes = np.zeros((top, clusters, octets, words * 8), np.uint8)
    lanes[..., :columns] = planes.reshape(clusters, columns, top, octets).transpose(2, 0, 3, 1)
    source = lanes.view("<u8")
    codes = np.zeros((clusters, octets, 8, words), "<u8")
    gathered = np.empty((clusters, octets, words), "<u8")
    moved = np.empty_like(gathered)
    for j in range(8):
        gathered.fill(0)
        for bit in range(top):
            _shift(source[bit], bit - j, out=moved)
            np.bitwise_and(moved, np.uint64(_ONES << bit), out=moved)
            np.bitwise_or(gathered, moved, out=gathered)
        codes[:, :, j] = gathered
    return codes.view(np.uint8).reshape(clusters, octets * 8, words * 8)[:, :rows, :columns]


def _shift(words: Words, left: int, out: Words) -> None:
    """Shift every word left, or right where `left` is negative."""
    shift = np.left_shift if left >= 0 else np.right_shift
    shift(words, np.uint64(abs(left)), out=out)


def _stored_planes(depths: Bytes, top: int) -> npt.NDArray[np.bool_]:
    """Return which of the `top` planes of each group exist, in payload order, (c·k·top,)."""
    return (np.arange(top, dtype=np.uint8) < depths.reshape(-1, 1)).reshape(-1)

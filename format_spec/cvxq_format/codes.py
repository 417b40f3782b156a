"""Packing and unpacking the codes of whole matrices, single rows and single columns."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cvxq_format.errors import WriteError
from cvxq_format.geometry import Geometry
from cvxq_format.limits import MAX_DEPTH
from cvxq_format.planes import Chunk, chunks, pack_planes, unpack_planes
from cvxq_format.tensor import CompandedTensor

Bytes = npt.NDArray[np.uint8]


def pack_codes(codes: Bytes, depths: Bytes, group_size: int, partitions: int) -> Bytes:
    """Pack codes into the bit planes of a payload.

    codes: (E, R, Kc) or (R, Kc) uint8, rows in stored (permuted) order; depths: (E, C, Kc) or
    (C, Kc) uint8. Returns (bytes,) uint8.
    Raises WriteError if the shapes do not fit or a code needs more bits than its group has.
    """
    codes = codes[None] if codes.ndim == 2 else codes
    depths = depths[None] if depths.ndim == 2 else depths
    try:
        geometry = Geometry.of(codes.shape, group_size, partitions, transposed=False)
    except ValueError as error:
        raise WriteError(f"codes to pack: {error}") from error
    _check_codes(codes, depths, geometry)
    packed = [np.zeros(0, np.uint8)]
    for expert in range(geometry.experts):
        for part in chunks(geometry, range(geometry.clusters)):
            count = part.last - part.first
            piece = codes[expert, part.row_slice, part.left : part.right]
            depth = depths[expert, part.first : part.last, part.left : part.right]
            piece = piece.reshape(count, part.rows, -1)
            if np.any(piece.max(axis=1) >= np.left_shift(1, depth, dtype=np.int16)):
                raise WriteError(
                    f"clusters {part.first} to {part.last - 1}: a code is not below 2^depth"
                )
            packed.append(pack_planes(piece, depth))
    return np.concatenate(packed)


def _check_codes(codes: Bytes, depths: Bytes, geometry: Geometry) -> None:
    expected = (geometry.experts, geometry.clusters, geometry.columns)
    if codes.dtype != np.uint8 or depths.dtype != np.uint8:
        raise WriteError(f"codes and depths are {codes.dtype} and {depths.dtype}, expected uint8")
    if depths.shape != expected:
        raise WriteError(f"depths of shape {depths.shape}, {expected} expected")
    if depths.max() > MAX_DEPTH:
        raise WriteError(f"bit depth {depths.max()}, allowed 0 to {MAX_DEPTH}")


def unpack_codes(
    tensor: CompandedTensor, expert: int | None = None, clusters: slice = slice(None)
) -> Bytes:
    """Unpack codes, rows in stored order.

    expert: one expert, or None for all; clusters: consecutive clusters, default all.
    Returns (R', Kc) uint8 for one expert or a 2-D tensor, else (E, R', Kc); R' counts the rows of
    the chosen clusters.
    """
    geometry = tensor.geometry
    first, last, _ = clusters.indices(geometry.clusters)
    starts = geometry.cluster_starts()
    base, end = int(starts[first]), int(starts[max(first, last)])
    chosen = range(geometry.experts) if expert is None else range(expert, expert + 1)
    codes = np.empty((len(chosen), end - base, geometry.columns), np.uint8)
    for out, index in zip(codes, chosen, strict=True):
        for part, piece in unpacked_chunks(tensor, index, range(first, last)):
            rows = slice(part.row_slice.start - base, part.row_slice.stop - base)
            out[rows, part.left : part.right] = piece.reshape(-1, part.right - part.left)
    return codes[0] if expert is not None or len(tensor.shape) == 2 else codes


def unpacked_chunks(
    tensor: CompandedTensor, expert: int, clusters: range
) -> Iterator[tuple[Chunk, Bytes]]:
    """Yield each cache-sized chunk of consecutive clusters with its codes (c, n, k) uint8."""
    position = int(tensor.code_starts[expert * tensor.clusters + clusters.start])
    for part in chunks(tensor.geometry, clusters):
        depths = tensor.depths[expert, part.first : part.last, part.left : part.right]
        size = int(depths.sum(dtype=np.int64)) * ((part.rows + 7) // 8)
        packed = tensor.packed_codes[position : position + size]
        position += size
        yield part, unpack_planes(packed, depths, part.rows)


def unpack_rows(
    tensor: CompandedTensor, positions: npt.NDArray[np.int64], expert: int = 0
) -> Bytes:
    """Unpack the codes of chosen stored positions, (m, Kc) uint8, reading only their bytes."""
    clusters, inside = tensor.geometry.locate(positions)
    depths = tensor.depths[expert, clusters]
    octets = ((tensor.cluster_rows()[clusters] + 7) // 8)[:, None]
    before = np.cumsum(depths, axis=1, dtype=np.int64) - depths
    start = tensor.code_starts[expert * tensor.clusters + clusters] + inside // 8
    place = before * octets + start[:, None]
    shift = (inside % 8).astype(np.uint8)[:, None]
    codes = np.zeros(depths.shape, np.uint8)
    for bit in range(int(depths.max(initial=0))):
        # A missing plane reads some other byte, which the depth then masks.
        plane = tensor.packed_codes.take(place, mode="clip")
        codes |= (((plane >> shift) & (depths > bit)) << bit).astype(np.uint8)
        place += octets
    return codes


def unpack_column(tensor: CompandedTensor, column: int, expert: int = 0) -> Bytes:
    """Unpack the codes of one stored column, (R,) uint8, reading only its groups."""
    depths = tensor.depths[expert]
    before = depths[:, :column].sum(axis=1, dtype=np.int64)
    rows = tensor.cluster_rows()
    pieces = []
    for cluster, n in enumerate(rows):
        octets = (int(n) + 7) // 8
        start = int(tensor.code_starts[expert * tensor.clusters + cluster])
        start += int(before[cluster]) * octets
        depth = int(depths[cluster, column])
        planes = tensor.packed_codes[start : start + depth * octets].reshape(depth, octets)
        binary = np.unpackbits(planes, axis=1, count=int(n), bitorder="little")
        weight = np.left_shift(1, np.arange(depth, dtype=np.uint8), dtype=np.uint8)
        pieces.append((binary * weight[:, None]).sum(axis=0, dtype=np.uint8))
    return np.concatenate(pieces)

"""Codes to weights: the normative float32 arithmetic of FORMAT.md, section "Decoding".

Per weight, every operation rounded to nearest even in float32 and in this order:
S = scale_unit · scale_table[scale code]; t = float32(mean code) · mean_step;
w = S · (level + t), or S · level without means. The level of a 0-bit group is +0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cvxq_format.codebook import Codebook
from cvxq_format.codes import unpack_column, unpack_row, unpacked_chunks
from cvxq_format.companded import CompandedTensor

Floats = npt.NDArray[np.float32]


def dequantize(tensor: CompandedTensor, codebook: Codebook, expert: int | None = None) -> Floats:
    """Return the weights W, outputs × inputs, rows in source order.

    Returns (N, K) float32 for a matrix or one expert, (E, N, K) for a whole stack.
    """
    chosen = range(tensor.experts) if expert is None else range(expert, expert + 1)
    stored = np.empty((len(chosen), tensor.rows, tensor.columns), np.float32)
    levels = codebook.flat_levels()
    scales, means = tensor.scales(codebook), tensor.relative_means()
    for out, e in zip(stored, chosen, strict=True):
        source_rows = None if tensor.permutation is None else tensor.permutation[e]
        for part, codes in unpacked_chunks(tensor, e, range(tensor.clusters)):
            groups = (e, slice(part.first, part.last), slice(part.left, part.right))
            first_level = np.left_shift(1, tensor.depths[groups], dtype=np.intp) - 1
            weights = levels.take(codes + first_level[:, None], mode="clip")
            if means is not None:
                weights += means[groups][:, None]
            weights *= scales[groups][:, None]
            rows = part.row_slice if source_rows is None else source_rows[part.row_slice]
            out[rows, part.left : part.right] = weights.reshape(-1, part.right - part.left)
    result = np.ascontiguousarray(stored.swapaxes(1, 2)) if tensor.transposed else stored
    return result[0] if expert is not None or len(tensor.shape) == 2 else result


def dequantize_rows(
    tensor: CompandedTensor, codebook: Codebook, rows: npt.ArrayLike, expert: int = 0
) -> Floats:
    """Return chosen rows of W, (len(rows), K) float32, reading only their groups.

    rows: indices of outputs (of one expert), 0 … N − 1, in any order, repeats allowed.
    Raises IndexError for a row outside the matrix.
    """
    indices = np.asarray(rows, np.int64).reshape(-1)
    outputs = tensor.shape[-2]
    if indices.size and (indices.min() < 0 or indices.max() >= outputs):
        raise IndexError(f"rows {indices.min()} to {indices.max()}, allowed 0 to {outputs - 1}")
    result = np.empty((indices.size, tensor.shape[-1]), np.float32)
    levels = codebook.flat_levels()
    table = np.float32(tensor.scale_unit) * codebook.scale_table
    one = _stored_column if tensor.transposed else _stored_row
    for out, index in zip(result, indices, strict=True):
        out[:] = one(tensor, levels, table, int(index), expert)
    return result


def _stored_row(
    tensor: CompandedTensor, levels: Floats, table: Floats, row: int, expert: int
) -> Floats:
    position = row
    if tensor.permutation is not None:
        position = int(tensor.source_to_stored[expert, row])
    cluster, _ = tensor.geometry.locate(position)
    codes = unpack_row(tensor, position, expert)
    return _weights(tensor, levels, table, codes, (expert, cluster))


def _stored_column(
    tensor: CompandedTensor, levels: Floats, table: Floats, column: int, expert: int
) -> Floats:
    codes = unpack_column(tensor, column, expert)
    cluster = np.repeat(np.arange(tensor.clusters), tensor.cluster_rows())
    weights = _weights(tensor, levels, table, codes, (expert, cluster, column))
    if tensor.permutation is None:
        return weights
    return weights[tensor.source_to_stored[expert]]


def _weights(
    tensor: CompandedTensor,
    levels: Floats,
    table: Floats,
    codes: npt.NDArray[np.uint8],
    groups: tuple[object, ...],
) -> Floats:
    """Expand codes whose groups are picked from the (E, C, Kc) arrays by `groups`."""
    depths = tensor.depths[groups]  # type: ignore[index]
    weights = levels[codes + (np.left_shift(1, depths, dtype=np.intp) - 1)]
    if tensor.mean_codes is not None:
        codes_of_means = tensor.mean_codes[groups]  # type: ignore[index]
        weights += codes_of_means.astype(np.float32) * np.float32(tensor.mean_step)
    weights *= table[tensor.scale_codes[groups]]  # type: ignore[index]
    return np.asarray(weights, np.float32)

"""Codes to weights: the normative float32 arithmetic of FORMAT.md, section "Decoding".

Per weight, every operation rounded to nearest even in float32 and in this order:
S = scale_unit · scale_table[scale code]; t = float32(mean code) · mean_step;
w = S · (level + t), or S · level without means; with row scales, that times the factor of the
weight's output. The level of a 0-bit group is +0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cvxq_format.codebook import Codebook, first_levels
from cvxq_format.codes import unpack_column, unpack_rows, unpacked_chunks
from cvxq_format.tensor import CompandedTensor

Floats = npt.NDArray[np.float32]

_CACHED_WEIGHTS = 1 << 14
"""Weights expanded at a time: their 8-byte table indices stay in the cache."""

_ROW_WEIGHTS = 1 << 18
"""Weights of `dequantize_rows` expanded at a time."""


def dequantize(tensor: CompandedTensor, codebook: Codebook, expert: int | None = None) -> Floats:
    """Return the weights W, outputs × inputs, rows in source order.

    Returns (N, K) float32 for a matrix or one expert, (E, N, K) for a whole stack.
    """
    chosen = range(tensor.experts) if expert is None else range(expert, expert + 1)
    stored = np.empty((len(chosen), tensor.rows, tensor.columns), np.float32)
    scales, means = tensor.scales(codebook), tensor.relative_means()
    row_scales = tensor.row_scales()
    for out, e in zip(stored, chosen, strict=True):
        source_rows = tensor.stored_to_source(e)
        for part, codes in unpacked_chunks(tensor, e, range(tensor.clusters)):
            groups = (e, slice(part.first, part.last), slice(part.left, part.right))
            mean = None if means is None else means[groups]
            weights = _expand(codes, tensor.depths[groups], scales[groups], mean, codebook)
            rows = source_rows[part.row_slice]
            if row_scales is not None:
                weights *= row_scales[e, rows, None]
            out[rows, part.left : part.right] = weights
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
    step = max(1, _ROW_WEIGHTS // tensor.shape[-1])
    for first in range(0, indices.size, step):
        some = slice(first, first + step)
        if tensor.transposed:
            result[some] = _stored_columns(tensor, codebook, indices[some], expert)
        else:
            result[some] = _stored_rows(tensor, codebook, indices[some], expert)
    return result


def _stored_rows(
    tensor: CompandedTensor, codebook: Codebook, rows: npt.NDArray[np.int64], expert: int
) -> Floats:
    positions = tensor.source_to_stored[expert, rows]
    codes = unpack_rows(tensor, positions, expert)
    cluster, _ = tensor.geometry.locate(positions)
    weights = _expand_each(tensor, codebook, codes, (expert, cluster))
    row_scales = tensor.row_scales((expert, rows))
    if row_scales is not None:
        weights *= row_scales[:, None]
    return weights


def _stored_columns(
    tensor: CompandedTensor, codebook: Codebook, columns: npt.NDArray[np.int64], expert: int
) -> Floats:
    codes = np.stack([unpack_column(tensor, int(column), expert) for column in columns])
    cluster = np.repeat(np.arange(tensor.clusters), tensor.cluster_rows())
    weights = _expand_each(tensor, codebook, codes, (expert, cluster, columns[:, None]))
    return weights[:, tensor.source_to_stored[expert]]


def _expand(
    codes: npt.NDArray[np.uint8],
    depths: npt.NDArray[np.uint8],
    scales: Floats,
    means: Floats | None,
    codebook: Codebook,
) -> Floats:
    """Expand codes (c, n, k) of groups (c, k) to weights (c·n, k), a few rows at a time."""
    levels = codebook.flat_levels()
    clusters, rows, columns = codes.shape
    weights = np.empty(codes.shape, np.float32)
    first_level = first_levels(depths)[:, None]
    step = max(1, _CACHED_WEIGHTS // (clusters * columns))
    for first in range(0, rows, step):
        some = weights[:, first : first + step]
        index = codes[:, first : first + step] + first_level
        expanded = levels.take(index, mode="clip")
        if means is not None:
            expanded += means[:, None]
        np.multiply(expanded, scales[:, None], out=some)
    return weights.reshape(clusters * rows, columns)


def _expand_each(
    tensor: CompandedTensor,
    codebook: Codebook,
    codes: npt.NDArray[np.uint8],
    groups: Any,
) -> Floats:
    """Expand codes (m, k) whose groups are picked from the (E, C, Kc) arrays by `groups`."""
    weights = codebook.flat_levels().take(codes + first_levels(tensor.depths[groups]), mode="clip")
    means = tensor.relative_means(groups)
    if means is not None:
        weights += means
    weights *= tensor.scales(codebook, groups)
    return np.asarray(weights, np.float32)

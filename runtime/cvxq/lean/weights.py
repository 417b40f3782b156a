"""Tensors as a decoder's record uses them, checked: of an open file, or held in memory.

Names, shapes and rows that do not fit are a CorruptError, one line; the kernels trust this check.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from cvxq_format import CompandedTensor, CorruptError, RawTensor, dequantize
from cvxq_format.decoder_record import FILE_NAME, Norm, Rows

from cvxq.lean.products import Product, Tensors, Value

Floats = npt.NDArray[np.float32]


def read_product(tensors: Tensors, product: Product) -> tuple[Value, Floats | None]:
    """Return a product's matrix (N, K), its outputs in the order of its parts, and its bias (N,).

    Raises CorruptError for a shape, or rows that are not each of the matrix's once.
    """
    shape = (product.outputs, product.inputs)
    value = _read(tensors, product.weight, shape)
    bias = None if product.bias is None else read_floats(tensors, product.bias, shape[:1])
    if all(rows is None for rows, _ in product.rows) and len(product.rows) == 1:
        return value, bias
    order = _order(product)
    if np.array_equal(order, np.arange(len(order))):
        return value, bias
    return _reordered(value, order), None if bias is None else bias[order]


def read_floats(tensors: Tensors, name: str, shape: tuple[int, ...]) -> Floats:
    """Return a small tensor (a norm, a bias) of this shape as float32, expanded if packed.

    It is a copy: once a decoder is made, nothing that becomes of the file matters.
    """
    value = _read(tensors, name, shape)
    if isinstance(value, CompandedTensor):
        return dequantize(value, tensors.codebook(value.codebook))
    return value.to_float32().reshape(shape).copy()


def read_norm(tensors: Tensors, norm: Norm, size: int) -> tuple[Floats | None, Floats | None]:
    """Return weight, its offset added, and bias of a norm over `size` elements."""
    weight = None if norm.weight is None else read_floats(tensors, norm.weight, (size,))
    bias = None if norm.bias is None else read_floats(tensors, norm.bias, (size,))
    return weight if weight is None else weight + np.float32(norm.offset), bias


def _read(tensors: Tensors, name: str, shape: tuple[int, ...]) -> Value:
    try:
        value = tensors.read(name)
    except KeyError:
        raise CorruptError(
            f"{FILE_NAME} names tensor {name!r:.100}, not in the file; the file is corrupt"
        ) from None
    if tuple(value.shape) != shape:
        raise CorruptError(
            f"tensor {name!r:.100} has shape {tuple(value.shape)}, {FILE_NAME} needs {shape}; "
            "the file is corrupt"
        )
    return value


def _order(product: Product) -> npt.NDArray[np.int64]:
    """Return the stored row (N,) of each output."""
    parts = []
    for rows, count in product.rows:
        chosen = rows or Rows(0, count, 0)
        if chosen.run < 1 or count % chosen.run or max(chosen.first, chosen.step) > product.outputs:
            raise _wrong_rows(product)
        runs = np.arange(count // chosen.run)[:, None] * chosen.step
        parts.append((chosen.first + runs + np.arange(chosen.run)).reshape(-1))
    order = np.concatenate(parts)
    if not np.array_equal(np.sort(order), np.arange(product.outputs)):
        raise _wrong_rows(product)
    return order


def _wrong_rows(product: Product) -> CorruptError:
    return CorruptError(
        f"{FILE_NAME}: the parts of {product.weight!r:.100} are not each of its "
        f"{product.outputs} rows once; the file is corrupt"
    )


def _reordered(value: Value, order: npt.NDArray[np.int64]) -> Value:
    """Return a matrix (N, K) whose output i is output order[i] of `value`."""
    if isinstance(value, RawTensor):
        return replace(value, data=value.data.reshape(value.shape)[order])
    if value.transposed:
        return _reordered_columns(value, order)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    codes = value.row_scale_codes
    return replace(
        value,
        permutation=place[value.stored_to_source()][None],
        cluster_map=False,
        row_scale_codes=None if codes is None else codes[:, order],
    )


def _reordered_columns(value: CompandedTensor, order: npt.NDArray[np.int64]) -> CompandedTensor:
    """Likewise for a stored transpose, whose outputs are columns, each with bytes of its own."""
    planes = (value.cluster_rows() + 7) // 8
    codes, first = np.empty_like(value.packed_codes), 0
    for depths, plane in zip(value.depths[0].astype(np.int64), planes, strict=True):
        sizes = depths * plane
        starts, end = first + np.cumsum(sizes) - sizes, first + int(sizes.sum())
        sizes, starts = sizes[order], starts[order]
        within = np.arange(end - first) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        codes[first:end] = value.packed_codes[np.repeat(starts, sizes) + within]
        first = end
    means = value.mean_codes
    return replace(
        value,
        depths=value.depths[:, :, order],
        scale_codes=value.scale_codes[:, :, order],
        packed_codes=codes,
        mean_codes=None if means is None else means[:, :, order],
        column_terms=None,
        cluster_terms=None,
    )

"""A decoder's tensors, as its record uses them, checked: of an open file, or held in memory.

What the record says is compared with the tensors before anything computes: names, shapes, rows and
sizes. CorruptError, one line, for whatever does not fit; the kernels trust these checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from cvxq_format import Codebook, CompandedTensor, CorruptError, RawTensor, dequantize
from cvxq_format.decoder_record import FILE_NAME, DecoderRecord, Norm, Part, Rows

from cvxq.lean.errors import NotLeanError

Floats = npt.NDArray[np.float32]
Value = RawTensor | CompandedTensor

MOST_PLACES = 1 << 24  # of a text, and tokens of a vocabulary
_MOST_UNITS = 1 << 20  # of everything else that is counted: the kernels count products in 32 bits


class Tensors(Protocol):
    """What holds a decoder's tensors; an open `cvxq_format.Reader` does."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tensors."""

    def read(self, name: str) -> Value:
        """Return the tensor of this name or alias; raises KeyError if there is none."""

    def codebook(self, index: int) -> Codebook:
        """Return a codebook that a companded tensor names."""


@dataclass(frozen=True)
class Product:
    """A matrix (N, K) whose outputs are one part of the record, or several side by side.

    rows: of each part, which rows of the stored matrix (None: all), and how many outputs.
    """

    weight: str
    bias: str | None
    rows: tuple[tuple[Rows | None, int], ...]
    inputs: int

    @property
    def outputs(self) -> int:
        """N, of all parts together."""
        return sum(count for _, count in self.rows)


def products(
    parts: Sequence[tuple[Part, int]], inputs: int, tensors: Tensors
) -> tuple[Product, ...]:
    """Return what computes `parts` (each with its outputs), which share their K inputs.

    One product where all are rows of one matrix, else one for each.
    Raises NotLeanError where only some of them share a matrix.
    """
    made = [
        Product(
            tensors.aliases.get(part.weight, part.weight),
            None if part.bias is None else tensors.aliases.get(part.bias, part.bias),
            ((part.rows, count),),
            inputs,
        )
        for part, count in parts
    ]
    if len({(product.weight, product.bias) for product in made}) == 1:
        return (replace(made[0], rows=tuple(rows for product in made for rows in product.rows)),)
    if len({product.weight for product in made}) < len(made):
        raise NotLeanError(f"only some of the parts that read one input share {made[0].weight!r}")
    return tuple(made)


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
    """Return a small tensor (a norm, a bias) of this shape as float32, expanded if packed."""
    value = _read(tensors, name, shape)
    if isinstance(value, CompandedTensor):
        return dequantize(value, tensors.codebook(value.codebook))
    return value.to_float32().reshape(shape)


def read_norm(tensors: Tensors, norm: Norm, size: int) -> tuple[Floats | None, Floats | None]:
    """Return weight, its offset added, and bias of a norm over `size` elements."""
    weight = None if norm.weight is None else read_floats(tensors, norm.weight, (size,))
    bias = None if norm.bias is None else read_floats(tensors, norm.bias, (size,))
    return weight if weight is None else weight + np.float32(norm.offset), bias


def check_sizes(record: DecoderRecord) -> None:
    """Raise CorruptError for sizes no decoder can have, NotLeanError for what none here does."""
    counts = {
        "hidden": record.hidden,
        "embedding_width": record.embedding_width,
        "head_dim": record.head_dim,
        "heads · head_dim": record.heads * record.head_dim,
        "ffn": record.ffn,
        "layers": len(record.layers),
    }
    _check_counts(counts, _MOST_UNITS)
    _check_counts({"vocabulary": record.vocabulary, "context": record.context}, MOST_PLACES)
    _check_counts({"position_offset": record.position_offset + 1}, MOST_PLACES)
    windows = {f"window of layer {i}": a.attention.window for i, a in enumerate(record.layers)}
    _check_counts({where: 1 if w is None else w for where, w in windows.items()}, 1 << 62)
    caps = [record.logit_softcap, *(layer.attention.softcap for layer in record.layers)]
    if any(cap is not None and cap <= 0 for cap in caps):
        raise CorruptError(f"{FILE_NAME}: a softcap is not positive; the file is corrupt")
    if record.embedding_width != record.hidden and record.project_in is None:
        raise CorruptError(f"{FILE_NAME}: project_in is missing; the file is corrupt")
    turned = [rope for rope in record.ropes if rope.switch is not None]
    if any(len(r.long_inverse_frequencies) != len(r.inverse_frequencies) for r in turned):
        raise CorruptError(f"{FILE_NAME}: long and short frequencies differ in number")
    if len({rope.switch for rope in turned}) > 1:
        raise NotLeanError("layers turn long texts in another way from different lengths on")


def _check_counts(counts: Mapping[str, int], most: int) -> None:
    for name, count in counts.items():
        if not 1 <= count <= most:
            raise CorruptError(f"{FILE_NAME}: {name} is {count}, allowed 1 to {most}")


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
    sizes = value.depths[0].astype(np.int64) * planes[:, None]
    starts = np.cumsum(sizes).reshape(sizes.shape) - sizes
    sizes, starts = sizes[:, order].reshape(-1), starts[:, order].reshape(-1)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    means = value.mean_codes
    return replace(
        value,
        depths=value.depths[:, :, order],
        scale_codes=value.scale_codes[:, :, order],
        packed_codes=value.packed_codes[np.repeat(starts, sizes) + within],
        mean_codes=None if means is None else means[:, :, order],
        column_terms=None,
        cluster_terms=None,
    )

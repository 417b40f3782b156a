"""What the fields of a companded tensor must obey, whether it was read or is to be written."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cvxq_format import row_order
from cvxq_format.codebook import Codebook
from cvxq_format.errors import WriteError
from cvxq_format.limits import MAX_DEPTH, MAX_GROUP_SIZE, MAX_WEIGHTS_PER_BYTE
from cvxq_format.tensor import CompandedTensor

Bytes = npt.NDArray[np.uint8]


def check_values(tensor: CompandedTensor, codebook: Codebook) -> None:
    """Raise ValueError unless every weight that this side information allows is finite."""
    for name, value in (("scale unit", tensor.scale_unit), ("mean step", tensor.mean_step)):
        if not np.isfinite(value) or np.signbit(value):
            raise ValueError(f"{name} {value}, allowed finite and not below +0")
    if tensor.mean_codes is None and tensor.mean_step != 0:
        raise ValueError(f"mean step {tensor.mean_step} without means, allowed 0")
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.float32(tensor.scale_unit) * codebook.scale_table[-1]
        reach = codebook.largest_level() + np.float32(128) * np.float32(tensor.mean_step)
        if not np.isfinite(scale * reach):
            raise ValueError(f"scale unit {tensor.scale_unit} lets weights overflow float32")


def check_spare_rows(tensor: CompandedTensor) -> None:
    """Raise ValueError if a plane has a bit set past the last row of its cluster."""
    rows = np.tile(tensor.cluster_rows(), tensor.experts)
    if not np.any(rows % 8):
        return
    planes = tensor.depths.sum(axis=2, dtype=np.int64).reshape(-1)
    last_byte = np.cumsum(np.repeat((rows + 7) // 8, planes)) - 1
    allowed = np.where(rows % 8, (1 << rows % 8) - 1, 255).astype(np.uint8)
    spare = tensor.packed_codes[last_byte] & ~np.repeat(allowed, planes)
    if np.any(spare):
        index = int(np.searchsorted(np.cumsum(planes), np.flatnonzero(spare)[0], side="right"))
        cluster = index % tensor.clusters
        raise ValueError(f"spare bits in the codes of cluster {cluster} are not zero")


def check_depths(depths: Bytes) -> None:
    """Raise ValueError if a bit depth is above 8."""
    if depths.max() > MAX_DEPTH:
        raise ValueError(f"bit depth {depths.max()}, allowed 0 to {MAX_DEPTH}")


def check_tensor(tensor: CompandedTensor) -> None:
    """Raise WriteError if the fields of a tensor contradict each other."""
    try:
        geometry = tensor.geometry
        groups = (geometry.experts, geometry.clusters, geometry.columns)
        _check_array("depths", tensor.depths, np.uint8, groups)
        check_depths(tensor.depths)
        if tensor.group_size > MAX_GROUP_SIZE:
            raise ValueError(f"group size {tensor.group_size}, allowed 1 to {MAX_GROUP_SIZE}")
        _check_terms(tensor)
        _check_row_scales(tensor)
        _check_order(tensor)
        _check_blocks(tensor)
        _check_sizes(tensor)
        check_spare_rows(tensor)
    except (ValueError, IndexError) as error:
        raise WriteError(f"companded tensor {list(tensor.shape)}: {error}") from error


def _check_terms(tensor: CompandedTensor) -> None:
    if (tensor.column_terms is None) != (tensor.cluster_terms is None):
        raise ValueError("column_terms and cluster_terms go together")
    if not tensor.is_separable and (tensor.column_bits or tensor.column_shift):
        raise ValueError("explicit depths have column_bits 0 and column_shift 0")
    if not (0 <= tensor.column_bits <= 8 and 0 <= tensor.column_shift <= 8):
        raise ValueError("column_bits and column_shift allow 0 to 8")


def _check_row_scales(tensor: CompandedTensor) -> None:
    if tensor.row_scale_codes is None:
        if tensor.row_scale_bits:
            raise ValueError(
                f"row_scale_bits {tensor.row_scale_bits} without row scales, allowed 0"
            )
        return
    if tensor.transposed:
        raise ValueError("row scales of a transposed matrix, allowed only if it is not")
    if not 1 <= tensor.row_scale_bits <= 8:
        raise ValueError(f"row_scale_bits {tensor.row_scale_bits}, allowed 1 to 8")


def _check_order(tensor: CompandedTensor) -> None:
    if tensor.permutation is not None:
        shape = (tensor.experts, tensor.rows)
        _check_array("permutation", tensor.permutation, np.int64, shape)
        row_order.check_permutation(tensor.permutation, tensor.geometry)
    if tensor.cluster_map:
        if tensor.permutation is None:
            raise ValueError("a cluster map without a permutation")
        row_order.check_ascending(tensor.permutation, tensor.geometry)


def _check_blocks(tensor: CompandedTensor) -> None:
    """Raise ValueError if an array does not have its block's shape and type, or does not fit it."""
    for block in tensor.layout.blocks:
        values = getattr(tensor, block.field)
        if block.shape:
            _check_array(block.field, values, block.dtype, block.shape)
        if block.dtype is np.uint8:
            _check_range(block.field, values, block.width)


def _check_sizes(tensor: CompandedTensor) -> None:
    geometry = tensor.geometry
    expected = int(geometry.code_sizes(tensor.depths).sum())
    if tensor.packed_codes.dtype != np.uint8 or tensor.packed_codes.size != expected:
        raise ValueError(f"{tensor.packed_codes.size} bytes of codes, {expected} expected")
    if geometry.weights > MAX_WEIGHTS_PER_BYTE * tensor.payload_size:
        raise ValueError(
            f"{geometry.weights} weights in {tensor.payload_size} bytes, "
            f"allowed {MAX_WEIGHTS_PER_BYTE} per byte; use smaller groups"
        )


def _check_array(
    name: str, array: npt.NDArray[np.generic], dtype: type, shape: tuple[int, ...]
) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}"
        )


def _check_range(name: str, array: Bytes, width: int) -> None:
    if int(array.max()) >> width:
        raise ValueError(f"{name} up to {array.max()} do not fit {width} bits")

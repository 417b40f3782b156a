"""Which blocks a companded payload has, in which order, and how wide their values are.

`Layout.blocks` is the table of FORMAT.md, "Blocks". The sizes of a payload, its writing, its
reading and its checks all go through that table, and so does the account of a file's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cvxq_format import bits
from cvxq_format.geometry import Geometry
from cvxq_format.row_order import CLUSTER_MAP, PERMUTATION, Coding

Bytes = npt.NDArray[np.uint8]
Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Block:
    """One array of a payload, in C order.

    name: as in FORMAT.md, with underscores. kind: what its bytes are spent on. is_present: whether
    this payload has it. shape: of its values, () for a single one; width: bits of each. dtype: of
    the tensor's field. order: how a permutation becomes the values, and they a permutation.
    """

    name: str
    kind: str
    is_present: bool
    shape: tuple[int, ...]
    width: int
    dtype: type[np.generic] = np.uint8
    order: Coding | None = None

    @property
    def field(self) -> str:
        """The tensor's field that the block holds: an order of rows is a permutation there."""
        return self.name if self.order is None else "permutation"

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the block."""
        return bits.stream_size(self.count, self.width)

    @property
    def _is_array(self) -> bool:
        """Whether values are as wide as their type, so that the stream is a plain array."""
        return self.width == 8 * np.dtype(self.dtype).itemsize

    def pack(self, values: Values) -> Bytes:
        """Return the block's bytes; raises ValueError if a value does not fit."""
        if not self._is_array:
            return bits.pack_bits(values, self.width)
        stored = np.ascontiguousarray(values, np.dtype(self.dtype).newbyteorder("<"))
        return stored.reshape(-1).view(np.uint8)

    def unpack(self, data: Bytes) -> Values:
        """Return the values, of the block's shape; raises ValueError if spare bits are set."""
        if self._is_array:
            stored = data.view(np.dtype(self.dtype).newbyteorder("<"))
            values: Values = stored.astype(self.dtype)  # a copy: bytes in a payload lie unaligned
        else:
            values = bits.unpack_bits(data, self.count, self.width)
        return values.reshape(self.shape)[()]  # a single value as a scalar


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the blocks of a payload follow from, named as in the header.

    scale_bits: of the codebook. separable: whether depths are. cluster_map: only if permuted.
    row_scale_bits: 0 without row scales, which a transposed matrix never has.
    """

    geometry: Geometry
    scale_bits: int
    column_bits: int
    separable: bool
    means: bool
    permuted: bool
    cluster_map: bool
    row_scale_bits: int

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that the payload has, in their order; its codes follow them."""
        g = self.geometry
        groups, rows = (g.experts, g.clusters, g.columns), (g.experts, g.rows)
        columns, clusters = (g.experts, g.columns), (g.experts, g.clusters)
        by_row, by_cluster = self.permuted and not self.cluster_map, self.cluster_map
        row_bits, map_bits = _bits_below(g.partition_rows), _bits_below(g.clusters_per_partition)
        has_row_scales = self.row_scale_bits > 0
        table = (
            # name, kind, present if, shape, width in bits, type (and coding) of the field
            Block("scale_unit", "scales", True, (), 32, np.float32),
            Block("mean_step", "scales", True, (), 32, np.float32),
            Block("column_terms", "depths", self.separable, columns, self.column_bits),
            Block("cluster_terms", "depths", self.separable, clusters, 16, np.int16),
            Block("depths", "depths", not self.separable, groups, 4),
            Block("scale_codes", "scales", True, groups, self.scale_bits),
            Block("mean_codes", "means", self.means, groups, 8, np.int8),
            Block("permutation", "permutation", by_row, rows, row_bits, np.int64, PERMUTATION),
            Block("cluster_map", "permutation", by_cluster, rows, map_bits, np.int64, CLUSTER_MAP),
            # A matrix with row scales is not transposed: its outputs are its stored rows.
            Block("row_scale_codes", "row_scales", has_row_scales, rows, self.row_scale_bits),
        )
        return tuple(block for block in table if block.is_present)

    @property
    def side_bytes(self) -> int:
        """Bytes of a payload in front of its codes."""
        return sum(block.size for block in self.blocks)

    def pack(self, fields: Mapping[str, Any]) -> bytes:
        """Return the bytes in front of the codes; fields: those of the tensor, by name."""
        parts = []
        for block in self.blocks:
            values = fields[block.field]
            if block.order is not None:
                values = block.order.values(values, self.geometry)
            parts.append(block.pack(values))
        return b"".join(part.tobytes() for part in parts)

    def unpack(self, data: Bytes) -> dict[str, Any]:
        """Return the tensor's fields, by name, that the payload `data` holds before its codes.

        Raises ValueError if it is too short, spare bits are set or the order of rows is none.
        """
        if self.side_bytes > data.size:
            raise ValueError(
                f"payload of {data.size} bytes, side information alone needs {self.side_bytes}"
            )
        fields: dict[str, Any] = {}
        position = 0
        for block in self.blocks:
            values = block.unpack(data[position : position + block.size])
            position += block.size
            if block.order is not None:
                values = block.order.rows(values, self.geometry)
            fields[block.field] = values
        return fields


def _bits_below(count: int) -> int:
    """Return the bits of a number from 0 to count − 1: ⌈log2(count)⌉."""
    return (count - 1).bit_length()

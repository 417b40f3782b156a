"""Expand packed codes with torch operations, bit-equal to `cvxq_format.dequantize`.

The normative arithmetic is float32, each operation rounded: w = S · (level + t), or S · level
where the matrix stores no means, with S = scale_unit · scale_table[code], t = mean_code ·
mean_step; then times the row's factor where there is one.

How eight rows are decoded at once: `_SPREAD` maps a byte of one plane to an int64 whose eight
bytes are its eight bits.  Shifting plane b's word left by b and adding puts eight finished codes
into the eight bytes of one word (codes are < 256, so nothing carries over), and the word viewed
as bytes is the codes in row order.  Groups of one depth are decoded together, a bounded number
of weights at a time so that the temporaries stay small beside the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cvxq_kernels.packed import PackedWeight

CHUNK_WEIGHTS = 1 << 18  # decoded per step: about 3 MB of temporaries

_SPREAD = torch.tensor(
    [
        int.from_bytes(bytes(byte >> bit & 1 for bit in range(8)), "little", signed=True)
        for byte in range(256)
    ],
    dtype=torch.int64,
)


def dense(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Expand all of `weight` to (N, K) or (E, N, K); see `PackedWeight.dense`."""
    outputs, inputs = weight.shape[-2:]
    rows, columns = (inputs, outputs) if weight.transposed else (outputs, inputs)
    result = torch.empty((weight.experts, rows, columns), dtype=dtype, device=weight.device)
    step = max(1, CHUNK_WEIGHTS // (weight.group_size * columns))
    for expert in range(weight.experts):
        for first, last in _runs(weight.cluster_rows.tolist(), step):
            block = _clusters(weight, expert, first, last)  # (clusters, rows, columns)
            start = int(weight.cluster_first_row[first])
            block = block.reshape(-1, columns)
            order = torch.arange(start, start + len(block), device=weight.device)
            if weight.row_of_position is not None:
                order = weight.row_of_position[expert, start : start + len(block)]
            if weight.row_factors is not None:
                block = block * weight.row_factors[expert, order, None]
            result[expert].index_copy_(0, order, block.to(dtype))
    if weight.transposed:
        result = result.transpose(1, 2).contiguous()
    return result if len(weight.shape) == 3 else result[0]


def rows(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Expand rows `ids` of a plain matrix; see `PackedWeight.rows`."""
    if len(weight.shape) != 2:
        raise ValueError(f"rows of a stacked weight {weight.shape} are not defined; use dense()")
    unique, inverse = torch.unique(ids.to(weight.device), return_inverse=True)
    if len(unique) and (unique[0] < 0 or unique[-1] >= weight.shape[0]):
        raise IndexError(
            f"row ids span {int(unique[0])}..{int(unique[-1])}, allowed 0..{weight.shape[0] - 1}"
        )
    take = _stored_columns if weight.transposed else _stored_rows
    step = max(1, CHUNK_WEIGHTS // weight.shape[1])
    parts = [take(weight, part) for part in unique.split(step)]
    return torch.cat(parts).to(dtype)[inverse]


def _runs(heights: list[int], step: int) -> list[tuple[int, int]]:
    """Cut the clusters into runs [first, last) of one height and at most `step` clusters."""
    runs: list[tuple[int, int]] = []
    for index, height in enumerate(heights):
        if runs and heights[runs[-1][0]] == height and index - runs[-1][0] < step:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def _clusters(weight: PackedWeight, expert: int, first: int, last: int) -> torch.Tensor:
    """Decode clusters [first, last) of equal height n to (clusters, n, columns) float32."""
    depths = weight.depths[expert, first:last]
    height = int(weight.cluster_rows[first])
    plane = (height + 7) // 8
    starts = _column_starts(depths, plane, weight.cluster_offset[expert, first:last])
    codes = _decode_groups(weight.codes, depths.reshape(-1), starts.reshape(-1), plane)
    # int32 indices: 2^B + q, found with the group's depth; then everything is element-wise.
    index = codes.to(torch.int32) + (1 << depths.reshape(-1, 1).to(torch.int32))
    level = _look_up(weight.levels, index).reshape(*depths.shape, plane * 8)[..., :height]
    return _weights(weight, level, (expert, slice(first, last))).transpose(1, 2)


def _column_starts(depths: torch.Tensor, plane: int, offset: torch.Tensor) -> torch.Tensor:
    """First code byte of every group: (clusters, columns) int64, from depths of that shape."""
    sizes = depths.to(torch.int64) * plane
    return offset[:, None] + sizes.cumsum(1) - sizes


def _decode_groups(
    codes: torch.Tensor, depths: torch.Tensor, starts: torch.Tensor, plane: int
) -> torch.Tensor:
    """Codes of groups (n,) of `plane`-byte bit planes as (n, 8·plane) uint8, in row order."""
    spread = _SPREAD.to(codes.device)
    result = torch.zeros((len(depths), plane), dtype=torch.int64, device=codes.device)
    for depth in range(1, 9):
        groups = (depths == depth).nonzero()[:, 0]
        if not len(groups):
            continue
        span = torch.arange(depth * plane, device=codes.device)
        bytes_ = _look_up(codes, starts[groups, None] + span)
        words = _look_up(spread, bytes_.to(torch.int32)).reshape(-1, depth, plane)
        total = words[:, 0]
        for bit in range(1, depth):
            total = total + (words[:, bit] << bit)
        result.index_copy_(0, groups, total)
    return result.view(torch.uint8)


def _weights(weight: PackedWeight, level: torch.Tensor, groups: tuple[Any, ...]) -> torch.Tensor:
    """Scale and shift levels: the first axes of `level` are those of the groups indexed."""
    chosen = weight.scale_codes[groups]
    wide = (*chosen.shape, *[1] * (level.dim() - chosen.dim()))
    if weight.mean_codes is not None:
        mean = _look_up(weight.means, weight.mean_codes[groups].to(torch.int32) + 128)
        level += mean.reshape(wide)
    return level.mul_(_look_up(weight.scales, chosen.to(torch.int32)).reshape(wide))


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`table[index]` for a 1-D table; index_select is four times as fast on a CPU."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


def _stored_rows(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix stored as it is: (len(ids), K) float32, bit by bit from the planes."""
    position = ids if weight.position_of_row is None else weight.position_of_row[0, ids]
    cluster = torch.searchsorted(weight.cluster_first_row, position, right=True) - 1
    place = position - weight.cluster_first_row[cluster]
    plane = ((weight.cluster_rows[cluster] + 7) // 8)[:, None]
    depths = weight.depths[0, cluster].to(torch.int64)
    sizes = depths * plane
    starts = weight.cluster_offset[0, cluster][:, None] + sizes.cumsum(1) - sizes
    starts += (place // 8)[:, None]
    shift = (place % 8).to(torch.uint8)[:, None].expand_as(depths)
    code = torch.zeros_like(depths)
    for bit in range(int(depths.max()) if depths.numel() else 0):
        has_bit = depths > bit
        byte = weight.codes[(starts + bit * plane)[has_bit]]
        code[has_bit] += ((byte >> shift[has_bit]) & 1).to(torch.int64) << bit
    level = _look_up(weight.levels, code + (1 << depths))
    values = _weights(weight, level, (0, cluster))
    return values if weight.row_factors is None else values * weight.row_factors[0, ids, None]


def _stored_columns(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Rows of W that are columns of the stored Wᵀ: (len(ids), K) float32."""
    parts = []
    for first, last in _runs(weight.cluster_rows.tolist(), len(weight.cluster_rows)):
        depths = weight.depths[0, first:last]
        height = int(weight.cluster_rows[first])
        plane = (height + 7) // 8
        starts = _column_starts(depths, plane, weight.cluster_offset[0, first:last])[:, ids]
        chosen = depths[:, ids]
        codes = _decode_groups(weight.codes, chosen.reshape(-1), starts.reshape(-1), plane)
        index = codes.to(torch.int32) + (1 << chosen.reshape(-1, 1).to(torch.int32))
        level = _look_up(weight.levels, index).reshape(*chosen.shape, plane * 8)[..., :height]
        values = _weights(weight, level, (0, slice(first, last), ids))
        parts.append(values.transpose(0, 1).reshape(len(ids), -1))
    stored = torch.cat(parts, dim=1)
    return stored if weight.position_of_row is None else stored[:, weight.position_of_row[0]]

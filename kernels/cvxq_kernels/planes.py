"""Codes from the bit planes of a file, with torch operations on any device.

How eight rows are decoded at once: `_SPREAD` maps a byte of one plane to an int64 whose eight
bytes are its eight bits.  Shifting plane b's word left by b and adding puts eight finished codes
into the eight bytes of one word (codes are < 256, so nothing carries over), and the word viewed
as bytes is the codes in row order.  Groups of one depth are decoded together.
"""

from __future__ import annotations

import torch

_SPREAD = torch.tensor(
    [
        int.from_bytes(bytes(byte >> bit & 1 for bit in range(8)), "little", signed=True)
        for byte in range(256)
    ],
    dtype=torch.int64,
)


def group_starts(
    depths: torch.Tensor, cluster_offset: torch.Tensor, cluster_rows: torch.Tensor
) -> torch.Tensor:
    """First code byte of every group, (C, K) int64.

    depths: (C, K) uint8; cluster_offset, cluster_rows: (C,) int64, a cluster's first byte and rows.
    """
    sizes = depths.to(torch.int64) * plane_bytes(cluster_rows)[:, None]
    return cluster_offset[:, None] + sizes.cumsum(1) - sizes


def plane_bytes(cluster_rows: torch.Tensor) -> torch.Tensor:
    """Bytes of one bit plane of a group in clusters of so many rows."""
    return (cluster_rows + 7) // 8


def decode_groups(
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
        bytes_ = look_up(codes, starts[groups, None] + span)
        words = look_up(spread, bytes_.to(torch.int32)).reshape(-1, depth, plane)
        total = words[:, 0]
        for bit in range(1, depth):
            total = total + (words[:, bit] << bit)
        result.index_copy_(0, groups, total)
    return result.view(torch.uint8)


def decode_rows(
    codes: torch.Tensor,
    depths: torch.Tensor,
    starts: torch.Tensor,
    planes: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """Codes of one row each of n clusters, (n, K) int64, bit by bit from the planes.

    depths, starts: (n, K) int64, of the clusters' groups; planes, places: (n,) int64, bytes of a
    plane and the row's number in its cluster.
    """
    starts = starts + (places // 8)[:, None]
    shift = (places % 8).to(torch.uint8)[:, None].expand_as(depths)
    code = torch.zeros_like(depths)
    for bit in range(int(depths.max()) if depths.numel() else 0):
        has_bit = depths > bit
        byte = codes[(starts + bit * planes[:, None])[has_bit]]
        code[has_bit] += ((byte >> shift[has_bit]) & 1).to(torch.int64) << bit
    return code


def look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`table[index]` for a 1-D table; index_select is four times as fast on a CPU."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)

"""From the file's bit planes to the words of `layout`, on the device, and back.

One program makes one chunk of one tile.  Bit b of the code in column j and row r is read from its
plane and put where the layout wants it; the bits of a word are disjoint, so a sum joins them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from cvxq_kernels.gpu.layout import CHUNK, place_table
from cvxq_kernels.packed import PackedWeight
from cvxq_kernels.planes import group_starts, plane_bytes


@triton.jit
def repack_kernel(
    codes, group_starts, planes, first_rows, tiles, chunks, order, places, tile_of, words,
    columns, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the B·ROWS words of slot `program_id(0)`; tile_of: (slots, 2) tile and chunk."""
    slot = tl.program_id(0)
    tile = tl.load(tile_of + 2 * slot)
    number = tl.load(tile_of + 2 * slot + 1)
    cluster = tl.load(tiles + tile * 8)
    chunk = tl.load(tiles + tile * 8 + 2) + number
    entry = tl.load(chunks + chunk)
    depth = (entry >> 6) & 15
    lane = tl.arange(0, 32)
    valid = lane < (entry & 63)
    column = tl.load(order + tl.load(tiles + tile * 8 + 4) + (entry >> 10) + lane, valid, 0)
    start = tl.load(group_starts + cluster.to(tl.int64) * columns + column, valid, 0)
    plane = tl.load(planes + cluster)
    row = tl.load(first_rows + tile) + tl.arange(0, ROWS)
    wanted = valid[:, None] & (row // 8 < plane)[None, :]
    word = tl.arange(0, 8)[:, None]
    total = tl.zeros([8, ROWS], tl.int32)
    for bit in range(depth):
        pointers = codes + (start + bit * plane)[:, None] + (row // 8)[None, :]
        byte = tl.load(pointers, wanted, 0).to(tl.int32)
        value = (byte >> (row % 8)[None, :]) & 1
        place = tl.load(places + (depth * 32 + lane) * 8 + bit)
        shifted = value << (place & 31)[:, None]
        mine = (place >> 5)[None, :] == word
        total += tl.sum(tl.where(mine[:, :, None], shifted[None, :, :], 0), axis=1)
    base = tl.load(tile_of + 2 * tl.num_programs(0) + slot).to(tl.int64) * ROWS
    target = words + base + word * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(target, total, mask=word < depth)


@functools.cache
def places_on(device: torch.device) -> torch.Tensor:
    """`place_table` on `device`."""
    return torch.from_numpy(place_table()).to(device)


def repack(
    weight: PackedWeight,
    tiles: torch.Tensor,
    chunks: torch.Tensor,
    order: torch.Tensor,
    words: int,
    rows: int,
) -> torch.Tensor:
    """Return the device words of `weight`, (words · rows,) int32; the tables are `_Part`'s."""
    device = weight.device
    tile, number, base = chunk_places(tiles, chunks)
    plane = plane_bytes(weight.cluster_rows)
    starts = group_starts(weight.depths[0], weight.cluster_offset[0], weight.cluster_rows)
    same = torch.cat([tile.new_ones(1, dtype=torch.bool), tiles[1:, 0] != tiles[:-1, 0]])
    ordinal = torch.arange(len(tiles), device=device)
    first_rows = (ordinal - torch.where(same, ordinal, 0).cummax(0).values) * rows
    result = torch.empty(words * rows, dtype=torch.int32, device=device)
    tile_of = torch.cat([torch.stack([tile, number], 1).reshape(-1), base]).to(torch.int32)
    if len(tile):
        repack_kernel[(len(tile),)](
            weight.codes, starts, plane, first_rows, tiles, chunks, order, places_on(device),
            tile_of, result, weight.shape[1], ROWS=rows,
        )  # fmt: skip
    return result


def chunk_places(
    tiles: torch.Tensor, chunks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every slot (chunk of a tile): its tile, number in the cluster, and first word / rows."""
    device = tiles.device
    first = tiles[:, 2].to(torch.int64)
    cluster_first = torch.unique(first)
    ends = torch.cat([cluster_first[1:], first.new_tensor([len(chunks)])])
    count = ends[torch.searchsorted(cluster_first, first)] - first
    tile = torch.repeat_interleave(torch.arange(len(tiles), device=device), count)
    number = torch.arange(len(tile), device=device) - (count.cumsum(0) - count)[tile]
    depth = (chunks[first[tile] + number] >> 6) & 15
    base = depth.cumsum(0) - depth
    return tile, number, base


def unpack(
    words: torch.Tensor, tiles: torch.Tensor, chunks: torch.Tensor, rows: int
) -> torch.Tensor:
    """Codes of every slot from device words: (slots, 32, rows) uint8, the inverse of `repack`."""
    _, _, base = chunk_places(tiles, chunks)
    tile, number, _ = chunk_places(tiles, chunks)
    depth = (chunks[tiles[tile, 2] + number] >> 6 & 15).to(torch.int64)
    places = places_on(words.device).to(torch.int64)
    codes = torch.zeros((len(tile), CHUNK, rows), dtype=torch.int64, device=words.device)
    lanes = torch.arange(rows, device=words.device)
    for bit in range(8):
        place = places[depth, :, bit]  # (slots, 32)
        has_bit = (bit < depth)[:, None].expand_as(place)
        slot, column = has_bit.nonzero(as_tuple=True)
        where = place[slot, column]
        word = (base[slot] + where // 32) * rows
        value = words[word[:, None] + lanes].to(torch.int64) >> (where % 32)[:, None]
        codes[slot, column] |= (value & 1) << bit
    return codes.to(torch.uint8)

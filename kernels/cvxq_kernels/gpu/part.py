"""One packed weight cut into the tiles and chunks of `layout`, before its codes are moved.

Columns are visited in an order in which every cluster's depths ascend.  Separable depths have one
such order for the whole matrix, which is found by sorting the sums of depths; otherwise each
cluster gets its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from cvxq_kernels.gpu.layout import (
    CHUNK,
    CHUNK_BASE,
    CLUSTER,
    DEPTH_SHIFT,
    MAX_DEPTH,
    ORDER_BASE,
    RUN_FIELDS,
    SLOT_BASE,
    START_SHIFT,
    TILE_FIELDS,
    WORD_BASE,
)
from cvxq_kernels.packed import PackedWeight

STEP = 256  # clusters whose columns are looked at together, so that indices of eight bytes stay few
CHUNKS_STEP = 1 << 15  # and chunks


@dataclass(frozen=True, eq=False)
class Part:
    """One weight's tables as `DeviceMatrix` describes them, counted from its own first cluster.

    order is (K,) for all clusters or (C, K), not padded. first_rows: (T,) int32, the first row of a
    tile in its cluster. words: of all tiles, in units of a tile's rows.
    """

    weight: PackedWeight
    rows: int
    order: torch.Tensor
    runs: torch.Tensor
    chunks: torch.Tensor
    tiles: torch.Tensor
    first_rows: torch.Tensor
    first_tiles: torch.Tensor
    slot_tiles: torch.Tensor
    row_of: torch.Tensor
    factors: torch.Tensor
    scale_codes: torch.Tensor
    mean_codes: torch.Tensor | None
    top: torch.Tensor
    words: int

    @property
    def extent(self) -> tuple[int, ...]:
        """What a row of `tiles` counts on by from this part to the next."""
        clusters, chunks, slots = len(self.runs), len(self.chunks), len(self.slot_tiles)
        return clusters, self.words, chunks, slots, self.order.numel(), 1, 0, 0


def cut(weight: PackedWeight, rows: int) -> Part:
    """Cut a plain (N, K) weight into tiles of `rows` rows, on the device that it is on."""
    depths = weight.depths[0]  # (C, K) uint8
    order = _column_order(depths)
    counts = torch.stack([(depths == d).sum(1) for d in range(MAX_DEPTH + 1)], 1)  # (C, 9)
    run_chunks = (counts + CHUNK - 1) // CHUNK
    runs = run_chunks.new_zeros((len(depths), RUN_FIELDS))
    runs[:, 1:] = run_chunks.cumsum(1)
    chunks = _Chunks.of(counts, run_chunks)
    picked = partial(_pick, chunks, order, depths.shape[1])
    of_tile, within, first_tiles = _numbered((weight.cluster_rows + rows - 1) // rows)
    tiles = _tiles(of_tile, run_chunks, 0 if order.dim() == 1 else depths.shape[1])
    row_of, factors = _rows(weight, of_tile, within * rows, rows)
    means = weight.mean_codes
    return Part(
        weight=weight,
        rows=rows,
        order=order.to(torch.int32),
        runs=runs.to(torch.int32),
        chunks=chunks.entries(),
        tiles=tiles.to(torch.int32),
        first_rows=(within * rows).to(torch.int32),
        first_tiles=first_tiles.to(torch.int32),
        slot_tiles=_numbered(runs[of_tile, -1])[0].to(torch.int32),
        row_of=row_of.to(torch.int32),
        factors=factors,
        scale_codes=picked(weight.scale_codes[0]),
        mean_codes=None if means is None else picked(means[0]),
        top=torch.cat([weight.scales[c.int()].amax(1) for c in weight.scale_codes[0].split(STEP)]),
        words=int(_words(run_chunks)[of_tile].sum()),
    )


@dataclass(frozen=True, eq=False)
class _Chunks:
    """Chunks of all clusters: (n,) int64 each; start and width count columns in order."""

    cluster: torch.Tensor
    depth: torch.Tensor
    start: torch.Tensor
    width: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor, run_chunks: torch.Tensor) -> _Chunks:
        """Chunks for columns `counts`, and chunks `run_chunks`, of every cluster and depth."""
        run, number, _ = _numbered(run_chunks.reshape(-1))
        first = _before(counts, 1).reshape(-1)[run]
        left = counts.reshape(-1)[run] - number * CHUNK
        cluster, depth = run // (MAX_DEPTH + 1), run % (MAX_DEPTH + 1)
        return cls(cluster, depth, first + number * CHUNK, left.clamp(max=CHUNK))

    def entries(self) -> torch.Tensor:
        """The numbers that stand for them on the device, (n,) int32."""
        entry = self.start << START_SHIFT | self.depth << DEPTH_SHIFT | self.width
        return entry.to(torch.int32)

    def groups(self, order: torch.Tensor, columns: int, part: slice) -> torch.Tensor:
        """Index of every lane's group in (C, K), (chunks of `part`, CHUNK) int64, −1 for none."""
        lane = torch.arange(CHUNK, device=order.device)
        inside = lane < self.width[part, None]
        place = torch.where(inside, self.start[part, None] + lane, 0)
        cluster = self.cluster[part, None]
        column = order[place] if order.dim() == 1 else order[cluster, place]
        return torch.where(inside, cluster * columns + column, -1)


def _column_order(depths: torch.Tensor) -> torch.Tensor:
    """Order of columns (K,) in which all clusters' depths (C, K) ascend, or one each (C, K)."""
    shared = torch.sort(depths.sum(0), stable=True).indices
    ordered = depths[:, shared]
    if bool((ordered[:, 1:] >= ordered[:, :-1]).all()):
        return shared
    rows = [torch.sort(part, dim=1, stable=True).indices.int() for part in depths.split(STEP)]
    return torch.cat(rows)


def _tiles(of_tile: torch.Tensor, run_chunks: torch.Tensor, own_order: int) -> torch.Tensor:
    """Rows of `DeviceMatrix.tiles`, int64, for tiles of the clusters `of_tile` (T,).

    run_chunks: (C, 9), chunks of every depth; own_order: columns in a cluster's own order, or 0.
    """
    chunks, words = run_chunks.sum(1), _words(run_chunks)
    tiles = of_tile.new_zeros((len(of_tile), TILE_FIELDS))
    tiles[:, CLUSTER] = of_tile
    tiles[:, WORD_BASE] = _before(words[of_tile])
    tiles[:, CHUNK_BASE] = _before(chunks)[of_tile]
    tiles[:, SLOT_BASE] = _before(chunks[of_tile])
    tiles[:, ORDER_BASE] = of_tile * own_order
    return tiles


def _words(run_chunks: torch.Tensor) -> torch.Tensor:
    """Words of one row of each cluster, (C,), from its chunks of every depth (C, 9)."""
    return (run_chunks * torch.arange(MAX_DEPTH + 1, device=run_chunks.device)).sum(1)


def _rows(
    weight: PackedWeight, of_tile: torch.Tensor, first: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of every row of the tiles, −1 for padding, and its factor: (T · rows,) each.

    of_tile, first: (T,), the cluster of a tile and its first row there.
    """
    row = first[:, None] + torch.arange(rows, device=weight.device)
    valid = row < weight.cluster_rows[of_tile][:, None]
    place = torch.where(valid, weight.cluster_first_row[of_tile][:, None] + row, 0)
    output = place if weight.row_of_position is None else weight.row_of_position[0][place]
    factors = weight.scales.new_ones(output.shape)
    if weight.row_factors is not None:
        factors = weight.row_factors[0][output]
    return torch.where(valid, output, -1).reshape(-1), factors.reshape(-1)


def _numbered(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the members of groups of `counts`: their group and number in it; groups' first members.

    All int64, members (Σ counts,).
    """
    group = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    first = _before(counts)
    return group, torch.arange(len(group), device=counts.device) - first[group], first


def _before(counts: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Sums of all counts before each."""
    return counts.cumsum(dim) - counts


def _pick(
    chunks: _Chunks, order: torch.Tensor, columns: int, of_group: torch.Tensor
) -> torch.Tensor:
    """A byte of `of_group` (C, K) for every lane of every chunk, 0 where it has no group."""
    result = of_group.new_zeros((len(chunks.width), CHUNK))
    for first in range(0, len(result), CHUNKS_STEP):
        part = slice(first, first + CHUNKS_STEP)
        groups = chunks.groups(order, columns, part)
        result[part] = torch.where(groups < 0, 0, of_group.reshape(-1)[groups])
    return result.reshape(-1)

"""Which chunks each program of a product takes: shares of about equal cost, the heaviest first.

A cluster's columns ascend by depth, and a chunk of 5–8 bits costs five times as much as one of 1–3:
shares of equally many chunks would leave the slowest program four times the mean's work.  So a
tile is cut where the costs of its parts come out alike, and all that a program has to know stands
in one row of a table, its *item*: one access, where tile, cluster and run would be three.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cvxq_kernels.gpu.layout import (
    CHUNK_BASE,
    CLUSTER,
    MATRIX,
    MAX_DEPTH,
    ORDER_BASE,
    RUN_END,
    SLOT_BASE,
    WORD_BASE,
)

# Fields of an item; COUNTS and the words after it hold two counts of 16 bits each, of the depths
# 0 … 8 in turn.
(
    ITEM_TILE, ITEM_CLUSTER, ITEM_PART, ITEM_PARTS, ITEM_SUMS, ITEM_CHUNK, ITEM_SLOT, ITEM_WORD,
    ITEM_ORDER, ITEM_MATRIX, ITEM_COUNTS,
) = range(11)  # fmt: skip
ITEM_FIELDS = 16
COUNT_BITS = 16
COUNT_MASK = (1 << COUNT_BITS) - 1

# Instructions of a lane per chunk of depth 0 … 8 in tiles of 64 rows on sm_90, prologue included,
# as `tools/count_instructions.py` finds them; for depth 0, what its means cost.
MATVEC_COSTS = (40, 91, 95, 102, 135, 499, 495, 537, 415)
GEMM_COSTS = (1, 276, 268, 281, 377, 593, 591, 627, 559)
# Least of a program: fewer do not repay its prologue, and a single deep chunk would unbalance them.
LEAST_COST = 1800
LEAST_PARTS = 3  # of a tile on average


@dataclass(frozen=True, eq=False)
class Shares:
    """items: (programs, 16) int32; is_split: whether any tile has several programs.

    Of an item: the tile and its cluster; its part, of how many; where the sums of the tile's first
    part are, in tiles; its first chunk in `chunks`, in the scratch, and in `words`, in units of a
    tile's rows; its place in `order`; its matrix; its chunks of depth 0 … 8.
    """

    items: torch.Tensor
    is_split: bool


def share_out(
    tiles: torch.Tensor,
    runs: torch.Tensor,
    costs: tuple[int, ...],
    programs: int,
    with_pruned: bool,
) -> Shares:
    """Cut the chunks of all tiles into shares for about `programs` programs; waits for the device.

    tiles, runs: as in `DeviceMatrix`. costs: of a chunk of depth 0 … 8. with_pruned: chunks of
    depth 0 are somebody's work too, as their means are.
    """
    of_tile, ends = (table.cpu().numpy().astype(np.int64) for table in (tiles, runs))
    first = np.zeros(len(ends), np.int64) if with_pruned else ends[:, 1]
    counts = np.diff(np.maximum(ends, first[:, None]), axis=1)
    total = counts @ np.array(costs)
    clusters = of_tile[:, CLUSTER]
    # A tile of one part or two, according to its cluster, would leave shares of unlike cost.
    wanted = max(1, programs, LEAST_PARTS * len(of_tile) if programs > 1 else 1)
    limit = max(LEAST_COST, int(total[clusters].sum()) // wanted)
    parts = np.clip(-(-total // limit), 1, np.maximum(ends[:, RUN_END] - first, 1))
    cuts = _cuts(np.maximum(ends, first[:, None]), counts, np.array(costs), parts)
    tile = np.repeat(np.arange(len(of_tile)), parts[clusters])
    part = np.arange(len(tile)) - np.repeat(_before(parts[clusters]), parts[clusters])
    cluster = clusters[tile]
    begin, end = cuts[cluster, part], cuts[cluster, part + 1]
    upto = [np.clip(ends[cluster], None, place[:, None]) for place in (begin, end)]
    own = np.diff(upto[1], axis=1) - np.diff(upto[0], axis=1)
    words = np.diff(upto[0], axis=1) @ np.arange(MAX_DEPTH + 1)
    items = np.zeros((len(tile), ITEM_FIELDS), np.int64)
    items[:, ITEM_TILE], items[:, ITEM_CLUSTER] = tile, cluster
    items[:, ITEM_PART], items[:, ITEM_PARTS] = part, parts[cluster]
    items[:, ITEM_SUMS] = np.arange(len(tile)) - part
    items[:, ITEM_CHUNK] = of_tile[tile, CHUNK_BASE] + begin
    items[:, ITEM_SLOT] = of_tile[tile, SLOT_BASE] + begin
    items[:, ITEM_WORD] = of_tile[tile, WORD_BASE] + words
    items[:, ITEM_ORDER], items[:, ITEM_MATRIX] = of_tile[tile, ORDER_BASE], of_tile[tile, MATRIX]
    pairs = np.pad(own, ((0, 0), (0, 1)))
    packed = pairs[:, ::2] | pairs[:, 1::2] << COUNT_BITS
    items[:, ITEM_COUNTS : ITEM_COUNTS + packed.shape[1]] = packed
    heaviest = np.argsort(-(own @ np.array(costs)), kind="stable")
    moved = torch.from_numpy(items[heaviest].astype(np.int32)).to(tiles.device)
    return Shares(moved, bool((parts[clusters] > 1).any()))


def counts_of(items: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Chunks of depth 0 … 8 of every item, (programs, 9)."""
    words = items[:, ITEM_COUNTS:].astype(np.int64)
    pairs = np.stack([words & COUNT_MASK, words >> COUNT_BITS], axis=2)
    return pairs.reshape(len(items), -1)[:, : MAX_DEPTH + 1]


def _cuts(
    ends: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    costs: npt.NDArray[np.int64],
    parts: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Where the parts of each cluster's chunks begin and end, (C, most parts + 1).

    ends: (C, 10), first chunks of the depths; counts: (C, 9). Each part takes as nearly as whole
    chunks allow what the parts that are left share out.
    """
    before = np.pad((counts * costs).cumsum(1), ((0, 0), (1, 0)))  # cost of what is shallower
    cuts = np.repeat(ends[:, :1], parts.max(initial=1) + 1, axis=1)
    spent = np.zeros(len(ends))
    row = np.arange(len(ends))
    for part in range(parts.max(initial=1)):
        wanted = spent + (before[:, -1] - spent) / np.maximum(parts - part, 1)
        depth = np.clip((before[:, 1:] < wanted[:, None]).sum(1), 0, MAX_DEPTH)
        inside = np.rint((wanted - before[row, depth]) / costs[depth]).astype(np.int64)
        inside = np.clip(inside, 0, counts[row, depth])
        cuts[:, part + 1] = ends[row, depth] + inside
        spent = before[row, depth] + inside * costs[depth]
    cuts[row, parts] = ends[:, -1]
    return cuts


def _before(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sums of all counts before each."""
    return counts.cumsum() - counts

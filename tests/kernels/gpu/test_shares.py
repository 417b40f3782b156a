"""How the chunks of a matrix are shared out among programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cvxq_kernels.gpu import shares
from cvxq_kernels.gpu.layout import (
    CHUNK_BASE,
    CLUSTER,
    ORDER_BASE,
    SLOT_BASE,
    TILE_FIELDS,
    WORD_BASE,
)
from cvxq_kernels.gpu.shares import (
    ITEM_CHUNK,
    ITEM_ORDER,
    ITEM_PART,
    ITEM_PARTS,
    ITEM_SLOT,
    ITEM_SUMS,
    ITEM_TILE,
    ITEM_WORD,
    MATVEC_COSTS,
    counts_of,
    share_out,
)

COSTS = np.array(MATVEC_COSTS)


def tables(chunks: np.ndarray, tiles_of: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`tiles` and `runs` of clusters with the given chunks (C, 9) and numbers of tiles."""
    runs = np.pad(chunks.cumsum(1), ((0, 0), (1, 0)))
    cluster = np.repeat(np.arange(len(chunks)), tiles_of)
    tiles = np.zeros((len(cluster), TILE_FIELDS), np.int64)
    words, count = chunks @ np.arange(9), chunks.sum(1)
    tiles[:, CLUSTER], tiles[:, ORDER_BASE] = cluster, 7 * cluster
    for field, sizes in ((WORD_BASE, words), (SLOT_BASE, count)):
        tiles[:, field] = sizes[cluster].cumsum() - sizes[cluster]
    tiles[:, CHUNK_BASE] = (count.cumsum() - count)[cluster]
    return torch.from_numpy(tiles).int(), torch.from_numpy(runs).int()


@pytest.mark.parametrize("with_pruned", [False, True])
def test_every_chunk_is_somebodys(with_pruned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "LEAST_COST", 1)
    rng = np.random.default_rng(0)
    chunks = rng.integers(0, 5, (6, 9)) * (rng.random((6, 9)) < 0.7)
    chunks[3] = 0
    chunks[4, 1:] = 0
    tiles, runs = tables(chunks, [1, 2, 1, 1, 3, 2])
    found = share_out(tiles, runs, MATVEC_COSTS, 40, with_pruned)
    assert found.is_split
    items, counts = found.items.numpy().astype(np.int64), counts_of(found.items.numpy())
    cost = counts @ COSTS
    assert (np.diff(cost) <= 0).all()
    order = np.lexsort((items[:, ITEM_PART], items[:, ITEM_TILE]))
    items, counts = items[order], counts[order]
    assert np.array_equal(items[:, ITEM_SUMS] + items[:, ITEM_PART], np.arange(len(items)))
    for tile in range(len(tiles)):
        own = items[:, ITEM_TILE] == tile
        expected = chunks[tiles[tile, CLUSTER]].copy()
        skipped = 0 if with_pruned else expected[0]
        expected[0] -= skipped
        mine, begun = counts[own], counts[own].cumsum(0) - counts[own]
        assert np.array_equal(mine.sum(0), expected)
        assert (items[own, ITEM_PARTS] == own.sum()).all()
        assert np.array_equal(items[own, ITEM_PART], np.arange(own.sum()))
        before = begun.sum(1) + skipped
        assert np.array_equal(items[own, ITEM_CHUNK], int(tiles[tile, CHUNK_BASE]) + before)
        assert np.array_equal(items[own, ITEM_SLOT], int(tiles[tile, SLOT_BASE]) + before)
        words = int(tiles[tile, WORD_BASE]) + begun @ np.arange(9)
        assert np.array_equal(items[own, ITEM_WORD], words)
        assert (items[own, ITEM_ORDER] == 7 * int(tiles[tile, CLUSTER])).all()


def test_costs_are_alike_and_programs_as_many_as_wanted() -> None:
    """A quarter of the chunks deep, as at 4 bits; a deep chunk is a third of the least share."""
    rng = np.random.default_rng(1)
    chunks = rng.multinomial(300, [0, 0.05, 0.1, 0.3, 0.3, 0.15, 0.05, 0.05, 0], size=64)
    found = share_out(*tables(chunks, [1] * 64), MATVEC_COSTS, 1000, False)
    cost = counts_of(found.items.numpy()) @ COSTS
    assert 1000 <= len(cost) <= 1070
    assert cost.max() < 1.15 * cost.mean()


def test_a_program_has_no_less_than_it_repays() -> None:
    chunks = np.zeros((2, 9), np.int64)
    chunks[:, 3] = 20
    found = share_out(*tables(chunks, [1, 1]), MATVEC_COSTS, 10_000, False)
    assert len(found.items) == 4
    assert not share_out(*tables(chunks, [1, 1]), MATVEC_COSTS, 1, False).is_split

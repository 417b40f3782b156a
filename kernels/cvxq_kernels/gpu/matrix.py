"""A packed matrix in the device layout, or several that share their input stacked into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch

from cvxq_kernels.gpu.layout import (
    CHUNK,
    LOOK_AHEAD,
    MAX_DEPTH,
    SCALES,
    SLOT_BASE,
    TILE_ROWS,
    tile_rows,
)
from cvxq_kernels.gpu.part import Part, cut
from cvxq_kernels.gpu.repack import repack
from cvxq_kernels.gpu.shares import GEMM_COSTS, MATVEC_COSTS, Shares, share_out
from cvxq_kernels.gpu.tables import make_tables
from cvxq_kernels.packed import PackedWeight, UnsupportedWeightError

BLOCK_WEIGHTS = 1 << 24  # expanded at a time: 64 MiB of float32
AHEAD_WORDS = LOOK_AHEAD + MAX_DEPTH * TILE_ROWS[-1]  # words that the last chunk may ask for


class Block(NamedTuple):
    """Tiles [first_tile, last_tile) of a matrix, whose chunks are slots [first_slot, last_slot).

    places, outputs: int64, its rows that are no padding, and which outputs of the matrix they are.
    """

    first_tile: int
    last_tile: int
    first_slot: int
    last_slot: int
    places: torch.Tensor
    outputs: torch.Tensor


@dataclass(frozen=True, eq=False)
class DeviceMatrix:
    """Codes and side information of (N, K) weights, arranged for the kernels.

    rows: of a tile. words: int32, B·rows per chunk, WORD_BASE in units of `rows` words, and
    at their end as many that say nothing as may be asked for ahead.
    tiles: (T, 8) int32, fields of `layout`; a tile's chunks use slots SLOT_BASE … of the scratch.
    runs: (C, 10) int32, the first chunk of depth B = 0 … 8 of a cluster, and the end.
    chunks: int32, start << 10 | depth << 6 | columns: its place in `order` after ORDER_BASE.
    order: int32, the clusters' columns by depth, and 32 zeros: a chunk may be read as if full.
    scale_codes, mean_codes (or None): a byte per column of every chunk.
    scales: (matrices, 256) float32; mean_steps: (matrices,) float32; top: (C,) float32, the
    largest scale of a cluster. row_of: (T·rows,) int32, the output of a row, −1 for padding;
    factors: (T·rows,) float32, what the row's output is multiplied by. slot_tiles: (slots,),
    first_tiles: (C,) and place_of_row: (N,) int32, the tile of a slot, the first tile of a cluster,
    and where a row is in `row_of`. byte_words … units: see `LevelTables`.
    depths: bit B is set where a column has depth B. shared_order: `order` is that of all columns.
    """

    outputs: tuple[int, ...]
    inputs: int
    rows: int
    words: torch.Tensor
    tiles: torch.Tensor
    runs: torch.Tensor
    chunks: torch.Tensor
    order: torch.Tensor
    scale_codes: torch.Tensor
    mean_codes: torch.Tensor | None
    scales: torch.Tensor
    mean_steps: torch.Tensor
    top: torch.Tensor
    row_of: torch.Tensor
    factors: torch.Tensor
    slot_tiles: torch.Tensor
    first_tiles: torch.Tensor
    place_of_row: torch.Tensor
    byte_words: torch.Tensor
    wide_words: torch.Tensor
    half_words: torch.Tensor
    halves: torch.Tensor
    exact: torch.Tensor
    units: torch.Tensor
    depths: int
    shared_order: bool
    _shares: dict[tuple[str, int], Shares] = field(default_factory=dict)

    def shares(self, kind: Literal["matvec", "gemm"], programs: int) -> Shares:
        """Return how about `programs` programs share a product; the first time waits."""
        known = self._shares.get((kind, programs))
        if known is None:
            costs = MATVEC_COSTS if kind == "matvec" else GEMM_COSTS
            with_pruned = kind == "matvec" and self.mean_codes is not None
            known = share_out(self.tiles, self.runs, costs, programs, with_pruned)
            self._shares[kind, programs] = known
        return known

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K); N counts all outputs of stacked matrices."""
        return sum(self.outputs), self.inputs

    @property
    def slots(self) -> int:
        """Chunks of all tiles: places in the scratch of a product."""
        return len(self.slot_tiles)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.words.device

    @cached_property
    def blocks(self) -> list[Block]:
        """The tiles cut into runs of at most BLOCK_WEIGHTS weights, but of one tile at least.

        The first time waits for the device.
        """
        slots = [*self.tiles[:, SLOT_BASE].tolist(), self.slots]
        step = max(1, BLOCK_WEIGHTS // (self.rows * self.inputs))
        found = []
        for first in range(0, len(self.tiles), step):
            last = min(first + step, len(self.tiles))
            outputs = self.row_of[first * self.rows : last * self.rows].to(torch.int64)
            places = (outputs >= 0).nonzero()[:, 0]
            found.append(Block(first, last, slots[first], slots[last], places, outputs[places]))
        return found

    @cached_property
    def stored_place(self) -> torch.Tensor:
        """(T·rows,) int32: where a row is stored, −1 for padding."""
        places = torch.arange(len(self.row_of), dtype=torch.int32, device=self.device)
        return torch.where(self.row_of < 0, -1, places)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        lists = [shares.items for shares in self._shares.values()]
        tensors = [part for part in vars(self).values() if isinstance(part, torch.Tensor)]
        return sum(part.nbytes for part in (*tensors, *lists))


def check(weights: Sequence[PackedWeight]) -> None:
    """Raise UnsupportedWeightError unless `weights` can be stacked on a device."""
    first = weights[0]
    for weight in weights:
        if len(weight.shape) != 2 or weight.transposed:
            kind = "transposed" if weight.transposed else "stacked"
            raise UnsupportedWeightError(f"{kind} weight {weight.shape}: plain (N, K) ones only")
        if weight.shape[1] != first.shape[1]:
            raise UnsupportedWeightError(
                f"inputs {weight.shape[1]} and {first.shape[1]} differ: fused weights share theirs"
            )
        if not torch.equal(weight.levels.cpu(), first.levels.cpu()):
            raise UnsupportedWeightError("weights with different level tables cannot be fused")


def arrange(weights: Sequence[PackedWeight], device: torch.device) -> DeviceMatrix:
    """Repack `weights`, (N_i, K) with equal K and level tables, one below the other.

    Raises UnsupportedWeightError for stacked, transposed or unequal weights.
    """
    check(weights)
    rows = tile_rows(max(int(weight.cluster_rows.max()) for weight in weights))
    parts = [cut(weight.to(device), rows) for weight in weights]
    words = sum(part.words for part in parts)
    if words >= 1 << 31:
        raise UnsupportedWeightError(f"{words} rows of words, allowed below {1 << 31}")
    outputs = [part.weight.shape[0] for part in parts]
    tiles = [len(part.tiles) for part in parts]
    own_rows = [part.row_of for part in parts]
    row_of = torch.where(torch.cat(own_rows) < 0, -1, _stack(own_rows, outputs))
    order = torch.cat([part.order.reshape(-1) for part in parts])
    tables = make_tables(weights[0].levels.cpu().numpy())
    runs = torch.cat([part.runs for part in parts])
    moved: dict[str, Any] = {
        name: torch.from_numpy(table).to(device) for name, table in vars(tables).items()
    }
    present = (runs.diff(dim=1) > 0).any(0).tolist()
    return DeviceMatrix(
        outputs=tuple(outputs),
        inputs=parts[0].weight.shape[1],
        rows=rows,
        words=_words(parts, words * rows),
        tiles=_stack([p.tiles for p in parts], [p.tiles.new_tensor(p.extent) for p in parts]),
        runs=runs,
        chunks=torch.cat([part.chunks for part in parts]),
        order=torch.nn.functional.pad(order, (0, CHUNK)),
        scale_codes=torch.cat([part.scale_codes for part in parts]),
        mean_codes=_mean_codes(parts),
        scales=torch.stack([_padded(part.weight.scales) for part in parts]),
        mean_steps=torch.stack([part.weight.means[129] for part in parts]),
        top=torch.cat([part.top for part in parts]),
        row_of=row_of,
        factors=torch.cat([part.factors for part in parts]),
        slot_tiles=_stack([part.slot_tiles for part in parts], tiles),
        first_tiles=_stack([part.first_tiles for part in parts], tiles),
        place_of_row=_places(row_of, sum(outputs)),
        depths=sum(1 << d for d, there in enumerate(present) if there),
        shared_order=len(parts) == 1 and parts[0].order.dim() == 1,
        **moved,
    )


def _stack(tables: Sequence[torch.Tensor], steps: Sequence[Any]) -> torch.Tensor:
    """One table below the other, each counting on by the steps of those before it."""
    starts = accumulate(steps, initial=0)
    return torch.cat([table + start for table, start in zip(tables, starts, strict=False)])


def _words(parts: Sequence[Part], count: int) -> torch.Tensor:
    """The words of all parts, `count` of them, and zeros that may be asked for ahead."""
    result = torch.empty(count + AHEAD_WORDS, dtype=torch.int32, device=parts[0].weight.device)
    first = 0
    for part in parts:
        repack(part, result[first:])
        first += part.words * part.rows
    result[first:] = 0
    return result


def _mean_codes(parts: Sequence[Part]) -> torch.Tensor | None:
    """The codes of all parts, zeros for one without; None where no part has any."""
    if all(part.mean_codes is None for part in parts):
        return None
    zeros = [torch.zeros_like(part.scale_codes, dtype=torch.int8) for part in parts]
    codes = [part.mean_codes for part in parts]
    return torch.cat([z if c is None else c for c, z in zip(codes, zeros, strict=True)])


def _places(row_of: torch.Tensor, outputs: int) -> torch.Tensor:
    """Where every output is in `row_of`, (outputs,) int32."""
    places = torch.arange(len(row_of), dtype=torch.int32, device=row_of.device)
    result = places.new_empty(outputs)
    valid = row_of >= 0
    result[row_of[valid].to(torch.int64)] = places[valid]
    return result


def _padded(table: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(table, (0, SCALES - len(table)))

"""A packed matrix in the device layout, or several that share their input stacked into one.

Columns are visited in an order in which every cluster's depths ascend.  Separable depths have one
such order for the whole matrix, which is found by sorting the sums of depths; otherwise each
cluster gets its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cvxq_kernels.gpu.layout import CHUNK, MAX_DEPTH, tile_rows
from cvxq_kernels.gpu.repack import repack
from cvxq_kernels.gpu.tables import make_tables
from cvxq_kernels.packed import PackedWeight

# Fields of a row of `tiles`.
CLUSTER, WORD_BASE, CHUNK_BASE, SLOT_BASE, ORDER_BASE, MATRIX = range(6)
TILE_FIELDS = 8


class UnsupportedWeightError(ValueError):
    """A weight that the GPU kernels do not take; the text says why."""


@dataclass(frozen=True, eq=False)
class DeviceMatrix:
    """Codes and side information of (N, K) weights, arranged for the kernels.

    rows: of a tile. words: int32, B·rows per chunk, WORD_BASE in units of `rows` words.
    tiles: (T, 8) int32, the fields above; a tile's chunks use slots SLOT_BASE … of the scratch.
    runs: (C, 10) int32, the first chunk of depth B = 0 … 8 of a cluster, and the end.
    chunks: int32, start << 10 | depth << 6 | columns: its place in `order` after ORDER_BASE.
    order: int32, the clusters' columns by depth, and 32 zeros: a chunk may be read as if full.
    scale_codes, mean_codes (or None): a byte per column of every chunk.
    scales: (matrices, 256) float32; mean_steps: (matrices,) float32; top: (C,) float32, the
    largest scale of a cluster. row_of: (T·rows,) int32, the output of a row, −1 for padding;
    factors: (T·rows,) float32, what the row's output is multiplied by.
    byte_words … units: see `tables`.
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
    byte_words: torch.Tensor
    wide_words: torch.Tensor
    half_words: torch.Tensor
    halves: torch.Tensor
    exact: torch.Tensor
    units: torch.Tensor
    slots: int
    depths: int
    shared_order: bool

    @property
    def tile_count(self) -> int:
        """T, tiles of all clusters."""
        return len(self.tiles)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, torch.Tensor))


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
    parts = [_Part.of(weight.to(device), rows) for weight in weights]
    tiles, row_of, words = [], [], []
    clusters = chunks = slots = orders = word_rows = outputs = 0
    for index, part in enumerate(parts):
        table = part.tiles.clone()
        table[:, CLUSTER] += clusters
        table[:, WORD_BASE] += word_rows
        table[:, CHUNK_BASE] += chunks
        table[:, SLOT_BASE] += slots
        table[:, ORDER_BASE] += orders
        table[:, MATRIX] = index
        tiles.append(table)
        row_of.append(torch.where(part.row_of < 0, -1, part.row_of + outputs))
        words.append(repack(part.weight, part.tiles, part.chunks, part.order, part.words, rows))
        clusters += len(part.runs)
        chunks += len(part.chunks)
        slots += part.slots
        orders += part.order.numel()
        word_rows += part.words
        outputs += part.weight.shape[0]
    if word_rows >= 1 << 31:
        raise UnsupportedWeightError(f"{word_rows} rows of words, allowed below {1 << 31}")
    tables = make_tables(weights[0].levels.cpu().numpy())
    means = [part.mean_codes for part in parts]
    filled = [torch.zeros_like(p.scale_codes, dtype=torch.int8) if m is None else m
              for p, m in zip(parts, means, strict=True)]  # fmt: skip
    return DeviceMatrix(
        outputs=tuple(part.weight.shape[0] for part in parts),
        inputs=parts[0].weight.shape[1],
        rows=rows,
        words=torch.cat(words),
        tiles=torch.cat(tiles),
        runs=torch.cat([part.runs for part in parts]),
        chunks=torch.cat([part.chunks for part in parts]),
        order=torch.nn.functional.pad(
            torch.cat([part.order.reshape(-1) for part in parts]), (0, CHUNK)
        ),
        scale_codes=torch.cat([part.scale_codes for part in parts]),
        mean_codes=None if all(m is None for m in means) else torch.cat(filled),
        scales=torch.stack([_padded(part.weight.scales) for part in parts]),
        mean_steps=torch.stack([part.weight.means[129] for part in parts]),
        top=torch.cat([part.top for part in parts]),
        row_of=torch.cat(row_of),
        factors=torch.cat([part.factors for part in parts]),
        byte_words=torch.from_numpy(tables.words).to(device),
        wide_words=torch.from_numpy(tables.wide_words).to(device),
        half_words=torch.from_numpy(tables.half_words).to(device),
        halves=torch.from_numpy(tables.halves).to(device),
        exact=torch.from_numpy(tables.exact).to(device),
        units=torch.from_numpy(tables.units).to(device),
        slots=slots,
        depths=sum(1 << d for d in sorted({d for part in parts for d in part.depths})),
        shared_order=len(parts) == 1 and parts[0].order.dim() == 1,
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """One weight's tables, counted from its own first cluster, chunk and slot."""

    weight: PackedWeight
    order: torch.Tensor
    runs: torch.Tensor
    chunks: torch.Tensor
    tiles: torch.Tensor
    row_of: torch.Tensor
    factors: torch.Tensor
    scale_codes: torch.Tensor
    mean_codes: torch.Tensor | None
    top: torch.Tensor
    slots: int
    words: int  # in units of a tile's rows
    depths: tuple[int, ...]

    @classmethod
    def of(cls, weight: PackedWeight, rows: int) -> _Part:
        device = weight.device
        depths = weight.depths[0].to(torch.int64)  # (C, K)
        order, sorted_depths = _column_order(depths)
        counts = torch.stack([(depths == d).sum(1) for d in range(MAX_DEPTH + 1)], 1)  # (C, 9)
        run_chunks = (counts + CHUNK - 1) // CHUNK
        runs = torch.zeros((len(depths), MAX_DEPTH + 2), dtype=torch.int64, device=device)
        runs[:, 1:] = run_chunks.cumsum(1)
        totals = runs[:, -1]
        # One entry per chunk: its cluster, depth, number in the run, first column and columns.
        flat = run_chunks.reshape(-1)
        run = torch.repeat_interleave(torch.arange(len(flat), device=device), flat)
        number = torch.arange(len(run), device=device) - (flat.cumsum(0) - flat)[run]
        depth = run % (MAX_DEPTH + 1)
        start = (counts.cumsum(1) - counts).reshape(-1)[run] + number * CHUNK
        width = (counts.reshape(-1)[run] - number * CHUNK).clamp(max=CHUNK)
        cluster = run // (MAX_DEPTH + 1)
        inside = torch.arange(CHUNK, device=device) < width[:, None]
        position = torch.where(inside, start[:, None] + torch.arange(CHUNK, device=device), 0)
        column = order[position] if order.dim() == 1 else order[cluster[:, None], position]
        pick = cluster[:, None] * depths.shape[1] + column

        def codes(of_group: torch.Tensor) -> torch.Tensor:
            return torch.where(inside, of_group.reshape(-1)[pick], 0).reshape(-1)

        chunk_words = depth.new_zeros(len(run) + 1)
        chunk_words[1:] = depth.cumsum(0)
        firsts = totals.cumsum(0) - totals  # first chunk of a cluster
        ends = torch.cat([firsts, firsts.new_tensor([len(run)])])
        size = chunk_words[ends[1:]] - chunk_words[ends[:-1]]  # words per row of a cluster
        heights = weight.cluster_rows
        tile_counts = (heights + rows - 1) // rows
        of_tile = torch.repeat_interleave(torch.arange(len(heights), device=device), tile_counts)
        within = torch.arange(len(of_tile), device=device)
        within -= (tile_counts.cumsum(0) - tile_counts)[of_tile]
        tiles = torch.zeros((len(of_tile), TILE_FIELDS), dtype=torch.int64, device=device)
        tiles[:, CLUSTER] = of_tile
        tiles[:, WORD_BASE] = size[of_tile].cumsum(0) - size[of_tile]
        tiles[:, CHUNK_BASE] = firsts[of_tile]
        tiles[:, SLOT_BASE] = totals[of_tile].cumsum(0) - totals[of_tile]
        tiles[:, ORDER_BASE] = 0 if order.dim() == 1 else of_tile * depths.shape[1]
        row = within[:, None] * rows + torch.arange(rows, device=device)
        place = weight.cluster_first_row[of_tile][:, None] + row
        valid = row < heights[of_tile][:, None]
        place = torch.where(valid, place, 0)
        target = place if weight.row_of_position is None else weight.row_of_position[0][place]
        factors = weight.scales.new_ones(target.shape)
        if weight.row_factors is not None:
            factors = weight.row_factors[0][target]
        means = weight.mean_codes
        table = weight.scales[weight.scale_codes[0].to(torch.int64)]
        return cls(
            weight=weight,
            order=order.to(torch.int32),
            runs=runs.to(torch.int32),
            chunks=(start << 10 | depth << 6 | width).to(torch.int32),
            tiles=tiles.to(torch.int32),
            row_of=torch.where(valid, target, -1).to(torch.int32).reshape(-1),
            factors=factors.reshape(-1),
            scale_codes=codes(weight.scale_codes[0]),
            mean_codes=None if means is None else codes(means[0]),
            top=table.amax(1),
            slots=int(totals[of_tile].sum()),
            words=int(size[of_tile].sum()),
            depths=tuple(int(d) for d in torch.unique(sorted_depths)),
        )


def _column_order(depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order of columns (K,) in which all clusters' depths (C, K) ascend, or one each (C, K)."""
    shared = torch.sort(depths.sum(0), stable=True).indices
    ordered = depths[:, shared]
    if bool((ordered.diff(dim=1) >= 0).all()):
        return shared, ordered
    found = torch.sort(depths, dim=1, stable=True)
    return found.indices, found.values


def _padded(table: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(table, (0, 256 - len(table)))

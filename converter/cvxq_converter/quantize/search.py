"""The scale, mean and codes of least squared error for groups of any depths at once.

The scale of every group starts at its standard deviation and is refined over the neighbouring
entries of the scale table (steps of 2^(1/8), the papers' search grid). Weights here are in units
of the matrix's largest scale, so that their squares stay far from the ends of float32; groups are
the last axis but one, the rows of a group the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from cvxq_format import Codebook

from cvxq_converter.allocate.scale_width import HEADROOM_STEPS, STEPS_PER_OCTAVE

MEAN_LIMIT = 127  # largest mean code
MEAN_REACH = 8.0  # largest mean, in units of its group's scale
SEARCH = ((-4, 4, 8), (-2, 2), (-1, 1))  # scale-table steps around the best so far, in turn
TABLE_LIMIT, TABLE_CELLS = 14.0, 256  # of the level table: its reach, and its cells per unit
CELLS = int(2 * TABLE_LIMIT * TABLE_CELLS)
SMALLEST_SCALE = 1e-30  # in place of the scale 0, which cannot divide


@dataclass(frozen=True)
class Tables:
    """The levels of all depths, laid out so that groups of any depths are looked up at once.

    levels: (9 · 256,) float32, level q of depth B at 256 B + q; borders: (9 · 257,) float32, the
    lower border of that level's cell at 257 B + q, the upper one after it. nearest, code: for each
    cell of a fine grid over ±TABLE_LIMIT the nearest level and its code, depth after depth.
    """

    levels: torch.Tensor
    borders: torch.Tensor
    nearest: torch.Tensor
    code: torch.Tensor

    @classmethod
    def of(cls, codebook: Codebook, device: torch.device) -> Tables:
        """Lay out the levels of a codebook; depth 0 has the one level 0."""
        centres = (torch.arange(CELLS) + 0.5) / TABLE_CELLS - TABLE_LIMIT
        levels, borders = torch.zeros(9, 256), torch.full((9, 257), torch.inf)
        codes = torch.zeros(9, CELLS, dtype=torch.int32)
        nearest = torch.zeros(9, CELLS)
        for depth in range(9):
            table = torch.zeros(1) if depth == 0 else torch.from_numpy(codebook.levels[depth - 1])
            middle = (table[1:] + table[:-1]) / 2
            levels[depth, : len(table)] = table
            borders[depth, 0] = -torch.inf
            borders[depth, 1 : len(table)] = middle
            codes[depth] = torch.bucketize(centres, middle, out_int32=True)
            nearest[depth] = table[codes[depth]]
        return cls(*(t.flatten().to(device) for t in (levels, borders, nearest, codes)))


@dataclass(frozen=True)
class Grid:
    """The scales and means that the groups of one matrix may use.

    unit: weight units per unit of everything else here. scales: (2^scale_bits,) float32 ladder,
    0 first; inverse: the same, divided into 1. middle: float32 log2 of the scales, borders between
    neighbours. mean_step: of means in units of the scale, 0 without means.
    """

    unit: np.float32
    scales: torch.Tensor
    inverse: torch.Tensor
    middle: torch.Tensor
    mean_step: np.float32

    def starts(self, mean: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
        """Index of the scale where each group's search begins; 0 for a group of zeros.

        mean, mean_square: of each group, in units. With means the search begins at the deviation
        about the mean, or where the mean comes within reach if that is higher.
        """
        spread = _spread(mean, mean_square, bool(self.mean_step > 0))
        index = torch.bucketize(torch.log2(spread.clamp_min(1e-38)) / 2, self.middle) + 1
        return torch.where(spread > 0, index, torch.zeros_like(index))


@dataclass(frozen=True)
class Choice:
    """Scale index and mean code of each group, code and reconstruction of each weight.

    scale (…,) int64, mean (…,) float32, codes (…, G) int32; centred and quantized (…, G) float32:
    the weights less their group's mean, and what the codes make of them; value adds the mean.
    """

    scale: torch.Tensor
    mean: torch.Tensor
    codes: torch.Tensor
    centred: torch.Tensor
    quantized: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Chosen:
    """The choices for all columns of a matrix, as they are made.

    codes: (K, C·G) uint8; scale_codes: (K, C) uint8; mean_codes: (K, C) int8; sums: (3, K, C)
    float64, for each group Σ (v − vq)², Σ v² and Σ v·vq, v being the weights less their mean.
    """

    codes: torch.Tensor
    scale_codes: torch.Tensor
    mean_codes: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def empty(cls, columns: int, clusters: int, group: int, device: torch.device) -> Chosen:
        """Nothing chosen yet."""
        shape = (columns, clusters)
        return cls(
            torch.zeros((columns, clusters * group), dtype=torch.uint8, device=device),
            torch.zeros(shape, dtype=torch.uint8, device=device),
            torch.zeros(shape, dtype=torch.int8, device=device),
            torch.zeros((3, *shape), dtype=torch.float64, device=device),
        )

    def keep(self, columns: slice | torch.Tensor, found: Choice, filled: torch.Tensor) -> None:
        """Take over the choices for some columns; filled: (C, G) 1 for a row, 0 for padding."""
        self.codes[columns] = found.codes.flatten(1).to(torch.uint8)
        self.scale_codes[columns] = found.scale.to(torch.uint8)
        self.mean_codes[columns] = found.mean.to(torch.int8)
        centred, quantized = found.centred * filled, found.quantized * filled
        self.sums[0, columns] = (centred - quantized).square().sum(-1).double()
        self.sums[1, columns] = centred.square().sum(-1).double()
        self.sums[2, columns] = (centred * quantized).sum(-1).double()

    def place(self, columns: torch.Tensor, clusters: slice, turned: Chosen) -> None:
        """Take over choices (K,) of some clusters, `turned` being in the order of `columns`."""
        group = self.codes.shape[1] // self.scale_codes.shape[1]
        rows = slice(clusters.start * group, clusters.stop * group)
        self.codes[columns, rows] = turned.codes[:, rows]
        self.scale_codes[columns, clusters] = turned.scale_codes[:, clusters]
        self.mean_codes[columns, clusters] = turned.mean_codes[:, clusters]
        self.sums[:, columns, clusters] = turned.sums[:, :, clusters]


def make_grid(
    mean: torch.Tensor, mean_square: torch.Tensor, codebook: Codebook, *, with_means: bool
) -> Grid:
    """Place the ladder of scales of one matrix.

    mean, mean_square: (C, K) float64 moments of the groups, in weight units.
    """
    device = mean.device
    top = float(_spread(mean, mean_square, with_means).max()) ** 0.5
    unit = np.float32(top * 2 ** (HEADROOM_STEPS / STEPS_PER_OCTAVE))
    scales = torch.from_numpy(codebook.scale_table).to(device)
    steps = torch.log2(scales[1:].double())
    middle = ((steps[1:] + steps[:-1]) / 2).float()
    inverse = 1 / scales.clamp_min(SMALLEST_SCALE)
    grid = Grid(unit, scales, inverse, middle, np.float32(with_means))
    if not with_means or unit == 0:
        return Grid(unit, scales, inverse, middle, np.float32(0))
    start = grid.starts((mean / float(unit)).float(), (mean_square / float(unit) ** 2).float())
    ratio = (mean.abs() / float(unit)) * inverse[start]
    largest = min(float(ratio.max()), MEAN_REACH) * 2 ** (1 / STEPS_PER_OCTAVE)
    return Grid(unit, scales, inverse, middle, np.float32(largest / MEAN_LIMIT))


def _spread(mean: torch.Tensor, mean_square: torch.Tensor, with_means: bool) -> torch.Tensor:
    """What a group's scale has to span, squared."""
    if not with_means:
        return mean_square
    variance = (mean_square - mean.square()).clamp_min(0)
    return torch.maximum(variance, (mean / MEAN_REACH).square())


def search_scales(
    weights: torch.Tensor,
    shares: torch.Tensor,
    depths: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    tables: Tables,
    grid: Grid,
    refine: bool,
) -> Choice:
    """Find scale, mean and codes of least squared error for each group.

    weights: (k, C, G) in units of the grid; shares: (C, G) of each row in the error; depths: (k, C)
    int64; moments: mean and mean square, each (k, C). The search halves its steps: the error has
    one minimum along the ladder, or nearly so. It reads levels from a fine table; the codes come
    from the exact borders between the levels. A group too small for the lowest scale takes the
    scale 0 if that is nearer.
    """
    mean = moments[0]
    start = grid.starts(*moments)
    offsets = (depths * CELLS).int()[..., None]
    unit = grid.inverse[start]  # of the errors

    def error(index: torch.Tensor) -> torch.Tensor:
        normalized, _ = _normalize(weights, mean, index, grid)
        distance = (tables.nearest[_cell(normalized, offsets)] - normalized).square_()
        return distance.mul_(shares).sum(-1) * (grid.scales[index] * unit).square()

    best = start
    if refine:
        least = error(best)
        for steps in SEARCH:
            centre = best
            for step in steps:
                index = (centre + step).clamp_(1, len(grid.scales) - 1)
                index = torch.where(start > 0, index, start)
                found = error(index)
                best = torch.where(found < least, index, best)
                least = torch.minimum(found, least)
        if bool((best == 1).any()):
            zero = ((weights * unit[..., None]).square_() * shares).sum(-1)
            best = torch.where((best == 1) & (zero < least), torch.zeros_like(best), best)
    normalized, mean_code = _normalize(weights, mean, best, grid)
    codes = _exact_codes(normalized, depths[..., None].int(), offsets, tables)
    scale = grid.scales[best][..., None]
    shift = scale * (mean_code * float(grid.mean_step))[..., None]
    quantized = scale * tables.levels[codes + (depths * 256).int()[..., None]]
    return Choice(best, mean_code, codes, weights - shift, quantized, quantized + shift)


def _cell(normalized: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    cell = normalized.add(TABLE_LIMIT).mul_(TABLE_CELLS).clamp_(0, CELLS - 1).int()
    return cell.add_(offsets)


def _exact_codes(
    normalized: torch.Tensor, depths: torch.Tensor, offsets: torch.Tensor, tables: Tables
) -> torch.Tensor:
    """The code of a cell's centre, moved by one where a border runs through the cell."""
    codes = tables.code[_cell(normalized, offsets)]
    place = codes + depths * 257
    codes = codes - (normalized <= tables.borders[place]).int()
    return codes + (normalized > tables.borders[place + 1]).int()


def _normalize(
    weights: torch.Tensor, mean: torch.Tensor, index: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights less their group's mean, in units of the scale at `index`, and the mean codes."""
    inverse = grid.inverse[index]
    step = float(grid.mean_step)
    if step == 0:
        return weights * inverse[..., None], torch.zeros_like(mean)
    code = (mean * inverse / step).round().clamp_(-MEAN_LIMIT, MEAN_LIMIT)
    return torch.addcmul(-code[..., None] * step, weights, inverse[..., None]), code

"""Groups → codes, scales, means.

The scale of every group starts at its standard deviation and is refined over the neighbouring
entries of the scale table (steps of 2^(1/8), the papers' search grid); the one with the least
squared error stays. A code is the nearest level. A group of depth 0 has no codes: it is its mean
where means are stored, else zero.
"""

from dataclasses import dataclass

import numpy as np
import torch
from cvxq_format import Codebook

from cvxq_converter.clustering import Clustering

MEAN_LIMIT = 127  # largest mean code
MEAN_REACH = 8.0  # largest mean, in units of its group's scale
SEARCH = ((-4, 4, 8), (-2, 2), (-1, 1))  # scale-table steps around the best so far, in turn
TABLE_LIMIT, TABLE_CELLS = 14.0, 256  # of the level table: its reach, and its cells per unit
HEADROOM_STEPS = 8  # the largest scale sits this far below the top of the table
STEPS_PER_OCTAVE = 8


@dataclass(frozen=True)
class QuantizedMatrix:
    """One quantized matrix (N, K), rows in stored order.

    codes: (N, K) uint8; scale_codes: (C, K) uint8; mean_codes: (C, K) int8 or None;
    depths: (C, K) uint8; scale_unit and mean_step: float32, see FORMAT.md.
    squared_error: (9,) float64 Σ (w − wq)² by bit depth. energy, projection: (9,) float64 Σ v² and
    Σ v·vq by bit depth, v being the weights less their group's mean.
    """

    clustering: Clustering
    depths: np.ndarray
    codes: np.ndarray
    scale_codes: np.ndarray
    mean_codes: np.ndarray | None
    scale_unit: np.float32
    mean_step: np.float32
    squared_error: np.ndarray
    energy: np.ndarray
    projection: np.ndarray


@dataclass(frozen=True)
class Grid:
    """The scales and means that the groups of one matrix may use.

    scales: (2^scale_bits,) float32 ladder; mean_step: of means in units of the scale, 0 without
    means. start: (C, K) int64, index of the scale where each group's search begins.
    """

    scale_unit: np.float32
    scales: torch.Tensor
    mean_step: np.float32
    start: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """Scale index (k,), mean code (k,) and codes (n, k) of groups of one cluster and depth."""

    scale: torch.Tensor
    mean: torch.Tensor
    codes: torch.Tensor


def means_pay(mean: torch.Tensor, mean_square: torch.Tensor, group_size: int) -> bool:
    """Whether storing 8-bit means earns more than spending the same bits on depth.

    mean, mean_square: (C, K). Removing the mean lowers the group's spread, which is worth
    ½ log2(mean square / variance) bits per weight; the mean costs 8 / G.
    """
    used = mean_square > 0
    if not bool(used.any()):
        return False
    variance = (mean_square - mean.square()).clamp_min(0)[used]
    gain = 0.5 * torch.log2(mean_square[used] / variance.clamp_min(1e-300))
    return float(gain.clamp(max=8).mean()) > 8 / group_size


def make_grid(
    mean: torch.Tensor, mean_square: torch.Tensor, codebook: Codebook, *, with_means: bool
) -> Grid:
    """Place the ladder of scales of one matrix and find where each group's search begins.

    mean, mean_square: (C, K) float64 moments of the groups. With means the search begins at the
    deviation about the mean, or where the mean comes within reach if that is higher.
    """
    spread = mean_square
    if with_means:
        variance = (mean_square - mean.square()).clamp_min(0)
        spread = torch.maximum(variance, (mean / MEAN_REACH).square())
    spread = spread.sqrt()
    unit = np.float32(float(spread.max()) * 2 ** (HEADROOM_STEPS / STEPS_PER_OCTAVE))
    scales = torch.from_numpy(codebook.scale_table * unit).to(mean.device)
    start = _nearest_in_log(spread, scales.double())
    if not with_means:
        return Grid(unit, scales, np.float32(0), start)
    ratio = mean.abs() / scales[start].clamp_min(1e-38)
    largest = min(float(ratio.max()), MEAN_REACH) * 2 ** (1 / STEPS_PER_OCTAVE)
    return Grid(unit, scales, np.float32(largest / MEAN_LIMIT), start)


def _nearest_in_log(values: torch.Tensor, ladder: torch.Tensor) -> torch.Tensor:
    """Index of the ladder entry nearest in ratio; 0 (the zero entry) for a group of zeros."""
    steps = torch.log2(ladder[1:].clamp_min(1e-300))
    middle = (steps[1:] + steps[:-1]) / 2
    index = torch.bucketize(torch.log2(values.clamp_min(1e-300)), middle) + 1
    return torch.where(values > 0, index, torch.zeros_like(index))


def quantize_matrix(
    weight: torch.Tensor,
    clustering: Clustering,
    depths: np.ndarray,
    codebook: Codebook,
    *,
    with_means: bool,
    refine: bool = True,
    moments: tuple[torch.Tensor, torch.Tensor],
    row_weights: np.ndarray,
) -> QuantizedMatrix:
    """Quantize weight (N, K) with the depths (C, K) and the codebook's levels.

    moments: the groups' (mean, mean square), as `group_moments` gives them. row_weights: (N,), what
    an error in each row counts for, in stored order.
    """
    grid = make_grid(*moments, codebook, with_means=with_means)
    device = weight.device
    permutation = torch.from_numpy(clustering.permutation).to(device)
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=device)
    scale_codes = grid.start.to(torch.uint8)
    mean_codes = torch.zeros_like(grid.start, dtype=torch.int8)
    error, energy, projection = np.zeros((3, 9))
    for c in range(clustering.clusters):
        low, high = int(clustering.bounds[c]), int(clustering.bounds[c + 1])
        block = weight[permutation[low:high]].float()
        weights = torch.from_numpy(row_weights[low:high]).to(device)
        for depth in np.unique(depths[c]):
            columns = torch.from_numpy(np.flatnonzero(depths[c] == depth)).to(device)
            part = block[:, columns]
            levels = torch.zeros(1) if depth == 0 else torch.from_numpy(codebook.levels[depth - 1])
            levels = levels.to(device)
            found = _search(
                part, weights, grid.start[c, columns], moments[0][c, columns], levels, grid, refine
            )
            scale_codes[c, columns] = found.scale.to(torch.uint8)
            mean_codes[c, columns] = found.mean
            codes[low:high, columns] = found.codes
            scale = grid.scales[found.scale]
            centred = (part - scale * (found.mean.float() * float(grid.mean_step))).double()
            quantized = (scale * levels[found.codes.long()]).double()
            error[depth] += float((centred - quantized).square().sum())
            energy[depth] += float(centred.square().sum())
            projection[depth] += float((centred * quantized).sum())
    return QuantizedMatrix(
        clustering=clustering,
        depths=depths,
        codes=codes.cpu().numpy(),
        scale_codes=scale_codes.cpu().numpy(),
        mean_codes=mean_codes.cpu().numpy() if with_means else None,
        scale_unit=grid.scale_unit,
        mean_step=grid.mean_step,
        squared_error=error,
        energy=energy,
        projection=projection,
    )


def _search(
    part: torch.Tensor,
    weights: torch.Tensor,
    start: torch.Tensor,
    mean: torch.Tensor,
    levels: torch.Tensor,
    grid: Grid,
    refine: bool,
) -> Choice:
    """The scale, mean and codes of least squared error for each column of part (n, k).

    weights: (n,) of the rows in the error. start: (k,) scale index to search around; mean: (k,).
    The search halves its steps: the error has one minimum along the ladder, or nearly so. It reads
    levels from a fine table, the codes come from the exact borders between the levels. A group too
    small for the lowest scale takes the scale 0 if that is nearer.
    """
    table = _level_table(levels)
    unit = grid.scales[start].clamp_min(1e-38)  # of the errors, one per column

    def error(index: torch.Tensor) -> torch.Tensor:
        normalized, _ = _normalize(part, mean, index, grid)
        cell = normalized.add(TABLE_LIMIT).mul_(TABLE_CELLS).clamp_(0, len(table) - 1)
        distance = (table[cell.int()] - normalized).square_()
        return weights @ distance * (grid.scales[index] / unit).square()

    best = start
    least = error(best)
    if refine:
        for steps in SEARCH:
            centre = best
            for step in steps:
                index = torch.where(
                    start > 0, (centre + step).clamp(1, len(grid.scales) - 1), start
                )
                found = error(index)
                best = torch.where(found < least, index, best)
                least = torch.minimum(found, least)
    if bool((best == 1).any()):
        zero = weights @ (part / unit).square_()
        best = torch.where((best == 1) & (zero < least), 0, best)
    normalized, mean_code = _normalize(part, mean, best, grid)
    codes = torch.bucketize(normalized, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return Choice(best, mean_code, codes.to(torch.uint8))


def _level_table(levels: torch.Tensor) -> torch.Tensor:
    """The nearest level of every cell of a fine grid over ±TABLE_LIMIT."""
    count = int(2 * TABLE_LIMIT * TABLE_CELLS)
    centres = (torch.arange(count, device=levels.device) + 0.5) / TABLE_CELLS - TABLE_LIMIT
    return levels[torch.bucketize(centres, (levels[1:] + levels[:-1]) / 2)]


def _normalize(
    part: torch.Tensor, mean: torch.Tensor, index: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (n, k) less their mean, in units of the scales (k,) at `index`, and the mean codes.

    The scale 0 of a group of zeros divides as if it were tiny: the weights stay zero.
    """
    inverse = 1 / grid.scales[index].clamp_min(1e-38)
    if not grid.mean_step > 0:
        return part * inverse, torch.zeros_like(index, dtype=torch.int8)
    step = float(grid.mean_step)
    code = (mean * inverse / step).round().clamp(-MEAN_LIMIT, MEAN_LIMIT).float()
    return part * inverse - code * step, code.to(torch.int8)

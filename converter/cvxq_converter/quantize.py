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
from cvxq_converter.companding import boundaries

MEAN_LIMIT = 127
SEARCH = tuple(range(-4, 9))  # scale-table steps around the standard deviation
HEADROOM_STEPS = 8  # the largest scale sits this far below the top of the table
STEPS_PER_OCTAVE = 8


@dataclass(frozen=True)
class QuantizedMatrix:
    """One quantized matrix (N, K), rows in stored order.

    codes: (N, K) uint8; scale_codes: (C, K) uint8; mean_codes: (C, K) int8 or None;
    depths: (C, K) uint8; scale_unit and mean_step: float32, see FORMAT.md.
    squared_error, energy, projection: (9,) float64, Σ (w − wq)², Σ w² and Σ w·wq by bit depth.
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
class GroupScales:
    """The grid of scales and means that the groups of one matrix may use."""

    scale_unit: np.float32
    mean_step: np.float32
    start: torch.Tensor  # (C, K) int64 index into the scale table, nearest to the deviation
    mean_codes: torch.Tensor | None  # (C, K) int8


def means_pay(mean: torch.Tensor, mean_square: torch.Tensor, group_size: int) -> bool:
    """Whether storing 8-bit means earns more than spending the same bits on depth.

    mean, mean_square: (C, K). Removing the mean lowers the group's spread, which is worth
    ½ log2(mean square / variance) bits per weight; the mean costs 8 / G.
    """
    used = mean_square > 0
    if not bool(used.any()):
        return False
    variance = (mean_square - mean.square()).clamp_min(0)[used]
    gain = 0.5 * torch.log2(mean_square[used] / variance.clamp_min(1e-30))
    return float(gain.clamp(max=8).mean()) > 8 / group_size


def group_scales(
    mean: torch.Tensor, mean_square: torch.Tensor, codebook: Codebook, *, with_means: bool
) -> GroupScales:
    """Place the scale grid of one matrix and choose every group's starting point on it.

    mean, mean_square: (C, K) float32 moments of the groups.
    """
    deviation = (
        (mean_square - mean.square()).clamp_min(0).sqrt() if with_means else mean_square.sqrt()
    )
    table = codebook.scale_table
    top = float(deviation.max())
    unit = np.float32(top * 2 ** (HEADROOM_STEPS / STEPS_PER_OCTAVE))
    if not np.isfinite(unit) or unit <= 0:
        unit = np.float32(0)
    ladder = torch.from_numpy(table.astype(np.float64)).to(deviation.device) * float(unit)
    start = _nearest_in_log(deviation.double(), ladder)
    if not with_means:
        return GroupScales(unit, np.float32(0), start, None)
    scale = ladder[start]
    ratio = torch.where(scale > 0, mean.double() / scale.clamp_min(1e-300), torch.zeros_like(scale))
    step = np.float32(max(float(ratio.abs().clamp(max=8).max()), 1e-6) / MEAN_LIMIT)
    codes = (ratio / float(step)).round().clamp(-MEAN_LIMIT, MEAN_LIMIT).to(torch.int8)
    return GroupScales(unit, step, start, codes)


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
) -> QuantizedMatrix:
    """Quantize weight (N, K) with the depths (C, K) and the codebook's levels.

    moments: the groups' (mean, mean square), as `group_moments` gives them.
    """
    grid = group_scales(*moments, codebook, with_means=with_means)
    device = weight.device
    permutation = torch.from_numpy(clustering.permutation).to(device)
    scales = torch.from_numpy(codebook.scale_table * grid.scale_unit).to(device)
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=device)
    scale_codes = grid.start.clone()
    error, energy, projection = np.zeros((3, 9))
    for c in range(clustering.clusters):
        low, high = int(clustering.bounds[c]), int(clustering.bounds[c + 1])
        block = weight[permutation[low:high]].float()
        offset = None
        if grid.mean_codes is not None:
            offset = grid.mean_codes[c].float() * float(grid.mean_step)
        for depth in np.unique(depths[c]):
            columns = torch.from_numpy(np.flatnonzero(depths[c] == depth)).to(device)
            part = block[:, columns]
            shift = None if offset is None else offset[columns]
            start = grid.start[c, columns]
            if depth == 0:
                levels = torch.zeros(1, device=device)
                chosen = torch.zeros(part.shape, dtype=torch.uint8, device=device)
                best = start
            else:
                levels = torch.from_numpy(codebook.levels[depth - 1]).to(device)
                best, chosen = _search(part, start, shift, levels, scales, refine)
                scale_codes[c, columns] = best
                codes[low:high, columns] = chosen
            value = levels[chosen.long()] if shift is None else levels[chosen.long()] + shift
            value *= scales[best]
            error[depth] += float((part - value).square().sum())
            energy[depth] += float(part.square().sum())
            projection[depth] += float((part * value).sum())
    return QuantizedMatrix(
        clustering=clustering,
        depths=depths,
        codes=codes.cpu().numpy(),
        scale_codes=scale_codes.to(torch.uint8).cpu().numpy(),
        mean_codes=None if grid.mean_codes is None else grid.mean_codes.cpu().numpy(),
        scale_unit=grid.scale_unit,
        mean_step=grid.mean_step,
        squared_error=error,
        energy=energy,
        projection=projection,
    )


def _search(
    part: torch.Tensor,
    start: torch.Tensor,
    shift: torch.Tensor | None,
    levels: torch.Tensor,
    scales: torch.Tensor,
    refine: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale index per column of part (n, k) and the codes (n, k) it gives.

    shift: (k,) means in units of the scale, or None. A group of zeros keeps scale 0.
    """
    edges = boundaries(levels)
    best_error = torch.full_like(start, torch.inf, dtype=torch.float32)
    best_index = start.clone()
    best_codes = torch.zeros(part.shape, dtype=torch.uint8, device=part.device)
    for step in SEARCH if refine else (0,):
        index = torch.where(start > 0, (start + step).clamp(1, len(scales) - 1), start)
        scale = scales[index]
        normalized = part / scale.clamp_min(1e-38)
        if shift is not None:
            normalized = normalized - shift
        q = torch.bucketize(normalized, edges, out_int32=True)
        value = levels[q] if shift is None else levels[q] + shift
        error = (scale * value - part).square().sum(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_index = torch.where(better, index, best_index)
        best_codes = torch.where(better, q.to(torch.uint8), best_codes)
    return best_index, best_codes

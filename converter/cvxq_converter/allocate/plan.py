"""Statistics and weights of one matrix → what its bits are worth.

Sensitivities are kept as N row sums and K column sums per matrix, and the sensitivity of a weight
is taken as their product: G_nk² = r_n c_k / Σ r. Measured per (cluster, column) instead, the
estimate is noisier and allocates worse: docs/ablation.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from cvxq_converter.allocate.allocation import (
    Worths,
    free_worths,
    separable_worths,
    trusted_offsets,
)
from cvxq_converter.allocate.clustering import (
    Clustering,
    choose_partitions,
    cluster_rows,
    group_moments,
    row_weights,
)
from cvxq_converter.allocate.experts import pool_experts
from cvxq_converter.allocate.row_scaling import RowScales, choose_row_scales
from cvxq_converter.allocate.shrinkage import shrink
from cvxq_converter.measure.sums import MatrixStatistics, Statistics
from cvxq_converter.options import Method
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Done

_PIECE = 1 << 22  # weights squared together
TOKEN_EXPONENT = 0.5
LEAST_TOKEN = 1 / 64  # of the mean sensitivity of tokens' rows: three bits of depth
SMALLEST_VARIANCE = 1e-12  # of the matrix's mean; below it a group is rounding noise about its mean


@dataclass(frozen=True)
class Sensitivity:
    """Mean squared gradient of one matrix: weight (n, k) has row[n] · column[k]."""

    row: np.ndarray
    column: np.ndarray

    @classmethod
    def uniform(cls, rows: int, columns: int) -> Sensitivity:
        """Sensitivity 1 everywhere."""
        return cls(np.ones(rows), np.ones(columns))

    @classmethod
    def from_statistics(cls, stats: MatrixStatistics, rows_are_tokens: bool = False) -> Sensitivity:
        """Shrink both axes towards their priors; keep the matrix's measured total.

        Other texts have other tokens: what calibration expects of one foretells theirs only to the
        power of `TOKEN_EXPONENT`, and one that it never expects may come: it keeps `LEAST_TOKEN`.
        """
        total = stats.row_sensitivity.sum()
        row = shrink(stats.row_sensitivity, stats.row_evidence, stats.sequences)
        if rows_are_tokens:
            row = row**TOKEN_EXPONENT
            row = np.maximum(row, LEAST_TOKEN * row.mean())
        column = shrink(stats.column_sensitivity, stats.column_evidence, stats.sequences)
        return cls(row / row.sum(), column / column.sum() * max(total, 1e-300))

    def of_normalized(self, scales: RowScales) -> Sensitivity:
        """The same for weights whose rows were divided by their scales."""
        return replace(self, row=self.row * scales.factors().astype(np.float64) ** 2)


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix cut into groups, with the moments and the worth of each group.

    row_scales: rows are divided by these first; everything else is of what results.
    row_weights: (N,) float32, stored order, mean 1 in each cluster.
    moments: weighted (mean, mean square), each (C, K) float64.
    worths: with the error of each cluster's outputs bounded (`trusted_offsets`).
    """

    matrix: Matrix
    clustering: Clustering
    row_scales: RowScales
    row_weights: np.ndarray
    moments: tuple[torch.Tensor, torch.Tensor]
    with_means: bool
    worths: Worths

    def deviation(self) -> torch.Tensor:
        """(C, K) float32 spread of each group: about its mean if means are stored, else about 0."""
        mean, mean_square = self.moments
        variance = mean_square - mean.square() if self.with_means else mean_square
        return variance.clamp_min(0).sqrt().float()


def make_plans(
    loaded: LoadedModel, statistics: Statistics, method: Method, progress: Done | None = None
) -> list[MatrixPlan]:
    """Plan every matrix of a model; statistics: by matrix name, those that were measured."""
    plans, scratch = [], loaded.streamed.scratch
    # Small weights are no less needed than large ones: inputs and norms make up for their size.
    blind = replace(method, uniform_depths=True)
    statistics = pool_experts(loaded.matrices, statistics)
    for done, matrix in enumerate(loaded.matrices, start=1):
        weight, stats = loaded.originals[matrix.name], statistics.get(matrix.name)
        if stats is None:
            plan = plan_matrix(matrix, weight, Sensitivity.uniform(*weight.shape), blind)
        else:
            sensitivity = Sensitivity.from_statistics(stats, matrix.rows_are_tokens)
            power = stats.input_second_moment
            plan = plan_matrix(matrix, weight, sensitivity, method, power)
        if weight.device.type == "cpu":
            mean, mean_square = plan.moments
            plan = replace(plan, moments=(scratch.copy(mean), scratch.copy(mean_square)))
        plans.append(plan)
        if progress is not None:
            progress(done, len(loaded.matrices))
    return plans


def plan_matrix(
    matrix: Matrix,
    weight: torch.Tensor,
    sensitivity: Sensitivity,
    method: Method,
    input_power: np.ndarray | None = None,
) -> MatrixPlan:
    """Cluster the rows of weight (N, K) and find the worth of every group.

    input_power: (K,) mean square of the inputs, 1 if not known.
    """
    rows, columns = weight.shape
    row_variance = _row_variance(weight)
    group_size = method.group_size
    partitions = choose_partitions(rows, group_size, method.partitions)
    clustering = cluster_rows(row_variance, sensitivity.row, group_size, partitions)
    scales = choose_row_scales(row_variance, columns, clustering)
    weight, sensitivity = scales.normalize(weight), sensitivity.of_normalized(scales)
    weights = row_weights(sensitivity.row, clustering)
    mean, mean_square = group_moments(weight, clustering, weights)
    with_means = method.means and means_pay(mean, mean_square, group_size)
    variance = (mean_square - mean.square()) if with_means else mean_square
    spread = variance.double().cpu().numpy()
    worth = group_worth(spread, sensitivity, clustering)
    if method.uniform_depths:
        worth = np.zeros_like(worth)
    fit = separable_worths if method.separable_depths else free_worths
    worths = fit(worth, clustering.cluster_rows)
    if method.largest_error < 1:
        energy = spread if input_power is None else spread * input_power
        trusted = trusted_offsets(worths, energy, method.largest_error)
        worths = replace(worths, largest_offsets=trusted)
    return MatrixPlan(matrix, clustering, scales, weights, (mean, mean_square), with_means, worths)


def _row_variance(weight: torch.Tensor) -> np.ndarray:
    """(N,) float64 mean square of each row of weight (N, K), in units of the largest square."""
    largest = torch.stack(weight.aminmax()).abs().max().float().clamp_min(1e-38)
    pieces = weight.split(max(1, _PIECE // weight.shape[1]))  # a table in float32 is large
    means = [(piece.float() / largest).square_().mean(1) for piece in pieces]
    return torch.cat(means).double().cpu().numpy()


def group_worth(
    variance: np.ndarray, sensitivity: Sensitivity, clustering: Clustering
) -> np.ndarray:
    """(C, K) float64 ½ log2(G² S²) in bits, −∞ for a group without spread.

    variance: (C, K) of the groups, in weight².
    """
    floor = SMALLEST_VARIANCE * float(variance.mean())
    row = sensitivity.row[clustering.permutation]
    cluster = np.add.reduceat(row, clustering.bounds[:-1]) / clustering.cluster_rows
    with np.errstate(divide="ignore"):
        spread = np.log2(np.where(variance > floor, variance, 0.0))
    return np.asarray(0.5 * (spread + np.log2(cluster[:, None] * sensitivity.column[None, :])))


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

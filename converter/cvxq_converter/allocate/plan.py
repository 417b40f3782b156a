"""Statistics and weights of one matrix → what its bits are worth.

Sensitivities are kept as N row sums and K column sums per matrix, and the sensitivity of a weight
is taken as their product: G_nk² = r_n c_k / Σ r. Measured per (cluster, column) instead, the
estimate is noisier; docs/ablation.md compares both.
"""

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
from cvxq_converter.allocate.row_scaling import RowScales, choose_row_scales
from cvxq_converter.allocate.shrinkage import shrink
from cvxq_converter.measure.statistics import MatrixStatistics
from cvxq_converter.quantize.columns import means_pay
from cvxq_converter.source.checkpoint import Matrix

SMALLEST_VARIANCE = 1e-12  # of the matrix's mean; below it a group is rounding noise about its mean


@dataclass(frozen=True)
class Sensitivity:
    """Mean squared gradient of one matrix: weight (n, k) has row[n] · column[k]."""

    row: np.ndarray
    column: np.ndarray

    @classmethod
    def uniform(cls, shape: tuple[int, int]) -> "Sensitivity":
        """Sensitivity 1 everywhere, for `--calibration none`."""
        return cls(np.ones(shape[0]), np.ones(shape[1]))

    @classmethod
    def from_statistics(cls, stats: MatrixStatistics) -> "Sensitivity":
        """Shrink both axes towards their priors; keep the matrix's measured total."""
        total = stats.row_sensitivity.sum()
        row = shrink(stats.row_sensitivity, stats.row_evidence, stats.sequences)
        column = shrink(stats.column_sensitivity, stats.column_evidence, stats.sequences)
        return cls(row / row.sum(), column / column.sum() * max(total, 1e-300))

    def of_normalized(self, scales: RowScales) -> "Sensitivity":
        """The same for weights whose rows were divided by their scales."""
        return replace(self, row=self.row * scales.factors().astype(np.float64) ** 2)


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix cut into groups, with the moments and the worth of each group.

    row_scales: rows are divided by these first; everything else is of what results.
    row_weights: (N,) float32, stored order, mean 1 in each cluster.
    moments: weighted (mean, mean square), each (C, K) float64.
    """

    matrix: Matrix
    clustering: Clustering
    row_scales: RowScales
    row_weights: np.ndarray
    moments: tuple[torch.Tensor, torch.Tensor]
    with_means: bool
    worths: Worths
    energy: np.ndarray

    def bounded_worths(self, largest_error: float, thresholds: np.ndarray) -> Worths:
        """The worths with the error of each cluster's outputs bounded (`trusted_offsets`)."""
        if largest_error >= 1:
            return self.worths
        trusted = trusted_offsets(self.worths, self.energy, largest_error, thresholds)
        return replace(self.worths, largest_offsets=trusted)

    def deviation(self) -> torch.Tensor:
        """(C, K) float32 spread of each group: about its mean if means are stored, else about 0."""
        mean, mean_square = self.moments
        variance = mean_square - mean.square() if self.with_means else mean_square
        return variance.clamp_min(0).sqrt().float()


def plan_matrix(
    matrix: Matrix,
    weight: torch.Tensor,
    sensitivity: Sensitivity,
    *,
    group_sensitivity: np.ndarray | None = None,
    group_size: int,
    partitions: int,
    uniform: bool,
    separable: bool,
    means: bool,
    input_power: np.ndarray | None = None,
) -> MatrixPlan:
    """Cluster the rows of weight (N, K) and find the worth of every group.

    group_sensitivity: (C, K) measured sum over each group, in place of the product of row and
    column. partitions: how many row partitions to allow, halved until each holds four groups.
    uniform: take every group's worth for equal. separable: fit worths by clusters and columns.
    means: allow stored means, used where they pay. input_power: (K,) mean square of the inputs, 1
    if not known.
    """
    rows, columns = weight.shape
    largest = torch.stack(weight.aminmax()).abs().max().float().clamp_min(1e-38)
    row_variance = (weight / largest).float().square_().mean(1).double().cpu().numpy()
    clustering = cluster_rows(
        row_variance,
        sensitivity.row,
        group_size,
        choose_partitions(rows, group_size, partitions),
    )
    if matrix.rows_are_tokens:
        # Calibration never meets most tokens. A scale shared by a cluster spares their rows, which
        # it takes for insensitive, no more than the others'.
        scales = RowScales.none(rows)
    else:
        scales = choose_row_scales(row_variance, columns, clustering)
    weight, sensitivity = scales.normalize(weight), sensitivity.of_normalized(scales)
    weights = row_weights(sensitivity.row, clustering)
    mean, mean_square = group_moments(weight, clustering, weights)
    with_means = means and means_pay(mean, mean_square, group_size)
    variance = (mean_square - mean.square()) if with_means else mean_square
    spread = variance.double().cpu().numpy()
    if group_sensitivity is not None:
        group_sensitivity = group_sensitivity * scales.mean_squares(clustering)[:, None]
    worth = group_worth(spread, sensitivity, clustering, group_sensitivity)
    if uniform:
        worth = np.zeros_like(worth)
    worths = (separable_worths if separable else free_worths)(worth, clustering.cluster_rows)
    return MatrixPlan(
        matrix=matrix,
        clustering=clustering,
        row_scales=scales,
        row_weights=weights,
        moments=(mean, mean_square),
        with_means=with_means,
        worths=worths,
        energy=spread if input_power is None else spread * input_power,
    )


def group_worth(
    variance: np.ndarray,
    sensitivity: Sensitivity,
    clustering: Clustering,
    group_sensitivity: np.ndarray | None = None,
) -> np.ndarray:
    """(C, K) float64 ½ log2(G² S²) in bits, −∞ for a group without spread.

    variance: (C, K) of the groups, in weight². group_sensitivity: (C, K) sums over the group's
    rows, where measured; a group that none of the sequences reached keeps the product.
    """
    floor = SMALLEST_VARIANCE * float(variance.mean())
    row = sensitivity.row[clustering.permutation]
    cluster = np.add.reduceat(row, clustering.bounds[:-1]) / clustering.cluster_rows
    with np.errstate(divide="ignore"):
        spread = np.log2(np.where(variance > floor, variance, 0.0))
    sensitivities = cluster[:, None] * sensitivity.column[None, :]
    if group_sensitivity is not None:
        measured = group_sensitivity / clustering.cluster_rows[:, None]
        sensitivities = np.where(measured > 0, measured, sensitivities)
    return 0.5 * (spread + np.log2(sensitivities))

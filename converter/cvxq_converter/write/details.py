"""What a report shows beyond its figures: curves and distributions, gathered only on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from cvxq_converter.allocate.plan import MatrixPlan
from cvxq_converter.measure.curve import Curve

LIMIT, BINS = 6.0, 120  # of the histograms of normalized weights, from −LIMIT to LIMIT
MOST_WEIGHTS = 1 << 22  # of one matrix that are looked at, in whole clusters
MOST_POSITIONS = 32  # bins of the KL by position


@dataclass(frozen=True)
class Distribution:
    """Density of weights divided by their standard deviation, in `BINS` equal bins.

    kurtosis: 3 for a Gaussian, 6 for a Laplace distribution.
    """

    density: tuple[float, ...]
    kurtosis: float


@dataclass(frozen=True)
class PositionLoss:
    """Mean KL ± its standard error over the tokens from one position to another, nats."""

    first: int
    last: int
    kl: float
    standard_error: float


@dataclass(frozen=True)
class Details:
    """Curves and distributions of one conversion.

    curve: None for round to nearest, which has no choice of rates. is_kl: whether the curve is of
        KL, else of the share of the weights' energy that is lost.
    by_group, by_matrix: of the original weights, in units of their group's deviation and of their
    matrix's.
    """

    curve: Curve | None
    is_kl: bool
    by_group: Distribution
    by_matrix: Distribution
    positions: tuple[PositionLoss, ...]


def losses_by_position(by_position: np.ndarray) -> tuple[PositionLoss, ...]:
    """Pool KL (S, L) into at most `MOST_POSITIONS` runs of positions of nearly equal length."""
    length = by_position.shape[1]
    edges = np.linspace(0, length, min(length, MOST_POSITIONS) + 1).round().astype(int)
    found = []
    for first, end in pairwise(edges):
        values = by_position[:, first:end].ravel()
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        found.append(PositionLoss(int(first), int(end) - 1, float(values.mean()), error))
    return tuple(found)


@torch.no_grad()
def weight_distributions(
    plans: Sequence[MatrixPlan], weight_of: Callable[[MatrixPlan], torch.Tensor]
) -> tuple[Distribution, Distribution]:
    """Distributions over all matrices: by group, and by matrix.

    Of a very large matrix only evenly spaced clusters are looked at.
    """
    by_group, by_matrix = _Sums(), _Sums()
    for plan in plans:
        weight, clustering, deviation = weight_of(plan), plan.clustering, plan.deviation()
        factors = torch.from_numpy(plan.row_scales.factors()).to(weight.device)
        permutation = torch.from_numpy(clustering.permutation).to(weight.device)
        spread = weight.float().std()
        step = -(-weight.numel() // MOST_WEIGHTS)
        for c in range(0, clustering.clusters, step):
            rows = permutation[int(clustering.bounds[c]) : int(clustering.bounds[c + 1])]
            block = weight[rows].float()
            if spread > 0:
                by_matrix.add(block / spread)
            block = block / factors[rows, None]
            if plan.with_means:
                block = block - plan.moments[0][c].float()
            used = deviation[c] > 0
            by_group.add(block[:, used] / deviation[c][used])
    return by_group.finish(), by_matrix.finish()


class _Sums:
    """Histogram and moments of normalized weights."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS)
        self.second = self.fourth = 0.0
        self.total = 0

    def add(self, values: torch.Tensor) -> None:
        self.counts += torch.histc(values.cpu(), BINS, -LIMIT, LIMIT).numpy()
        squares = values.double().square()
        self.second += float(squares.sum())
        self.fourth += float(squares.square().sum())
        self.total += values.numel()

    def finish(self) -> Distribution:
        width = 2 * LIMIT / BINS
        density = self.counts / max(self.total, 1) / width
        variance = self.second / max(self.total, 1)
        kurtosis = self.fourth / max(self.total, 1) / variance**2 if variance > 0 else 0.0
        return Distribution(tuple(float(d) for d in density), kurtosis)

"""Statistics and weights → the curve of rates, sizes and losses, without quantizing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from cvxq_format.codebook import DEPTHS

from cvxq_converter.allocate.allocation import GAUSSIAN_DISTORTION, code_bytes
from cvxq_converter.allocate.bias import layers_to_gain_bias
from cvxq_converter.allocate.plan import MatrixPlan, Sensitivity, group_worth
from cvxq_converter.allocate.sizes import Ledger, allocate, make_ledger
from cvxq_converter.measure.curve import Curve, Point
from cvxq_converter.measure.sums import Statistics
from cvxq_converter.options import Method, Target
from cvxq_converter.source.loaded import LoadedModel

STEP = 0.25  # bits per weight between the points of a curve
HIGHEST_RATE = 8.0


@torch.no_grad()
def predict_curve(
    loaded: LoadedModel,
    plans: Sequence[MatrixPlan],
    statistics: Statistics,
    documents: Mapping[str, bytes],
    method: Method,
) -> Curve:
    """Allocate at every rate from the smallest on, and add up what the errors will cost.

    plans: of all matrices. statistics: by matrix name; empty for the share of the weights' energy
    that is lost instead of KL. documents: as in `make_ledger`.
    """
    costs = [group_costs(p, statistics) for p in plans]
    scale = 0.5 if statistics else 1 / sum(float(c.sum()) for c in costs)
    gained = layers_to_gain_bias(loaded.matrices, statistics) if method.correct_biases else []
    ledger = make_ledger(loaded, plans, gained, documents, method)

    def point(rate: float) -> Point:
        found = allocate(plans, Target(bits=rate), ledger)
        lost = [
            (c * GAUSSIAN_DISTORTION[d]).sum() for c, d in zip(costs, found.depths, strict=True)
        ]
        codes = [
            code_bytes(d, p.worths.group_bytes) for d, p in zip(found.depths, plans, strict=True)
        ]
        return Point(rate, ledger.file_bytes(codes, found.stored_depths), scale * sum(lost))

    return Curve(tuple(point(rate) for rate in _rates(_lowest_rate(ledger))))


def _lowest_rate(ledger: Ledger) -> float:
    """Bits per weight that leave one byte for codes."""
    return 8 * (ledger.side_bytes(DEPTHS) + 1) / ledger.weights


def _rates(lowest: float) -> list[float]:
    """The lowest rate and every multiple of `STEP` between it and `HIGHEST_RATE`."""
    multiples = np.arange(0, HIGHEST_RATE + STEP / 2, STEP)
    return [lowest, *(float(rate) for rate in multiples if rate > lowest)]


def group_costs(plan: MatrixPlan, statistics: Statistics) -> np.ndarray:
    """(C, K) float64 loss, but for a common factor, if a group were set to its mean."""
    variance = plan.deviation().double().square().cpu().numpy()
    rows = plan.clustering.cluster_rows[:, None]
    stats = statistics.get(plan.matrix.name)
    if stats is None:
        return rows * variance * plan.row_scales.mean_squares(plan.clustering)[:, None]
    sensitivity = Sensitivity.from_statistics(stats, plan.matrix.rows_are_tokens)
    sensitivity = sensitivity.of_normalized(plan.row_scales)
    worth = group_worth(variance, sensitivity, plan.clustering)
    return np.asarray(rows * np.exp2(2 * worth))

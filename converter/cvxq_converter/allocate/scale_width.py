"""How many bits a model's scale codes take: a short ladder of scales, or one that reaches far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cvxq_converter.allocate.plan import MatrixPlan

HEADROOM_STEPS = 8  # the largest scale sits this far below the top of the table
STEPS_PER_OCTAVE = 8
NARROWEST, WIDEST = 5, 6  # four bits would leave groups less than an octave
LARGEST_LOSS = 64.0  # of a group at the wrong scale: as if one of three bits were pruned


def choose_scale_bits(plans: Sequence[MatrixPlan]) -> int:
    """The bits per scale code that cost least, all plans together.

    Codes of b bits cost b for each group, and 32 bits for each scale of the table. Groups whose
    deviation s lies below the lowest scale s0 of their matrix take that one, and their squared
    error grows by s0² / s². Depths are such that every weight's error costs alike, so the mean m
    of these factors costs ½ log2(m) per weight.
    """
    weights = sum(p.matrix.weight.numel() for p in plans)
    groups = sum(p.moments[0].numel() for p in plans)
    widths = range(NARROWEST, WIDEST + 1)
    grown = dict.fromkeys(widths, 0.0)
    for plan in plans:
        deviation = plan.deviation().double().cpu().numpy()
        for bits in widths:
            grown[bits] += _grown_error(deviation, plan.clustering.cluster_rows, bits)

    def cost(bits: int) -> float:
        side = bits * groups + (32 << bits)
        return side / weights + 0.5 * float(np.log2(grown[bits] / weights))

    return min(widths, key=cost) if weights else WIDEST


def _grown_error(deviation: np.ndarray, cluster_rows: np.ndarray, bits: int) -> float:
    """Sum over the weights of what their error is multiplied by, 1 for those within reach.

    deviation: (C, K) float64. The ladder reaches down from the largest of them.
    """
    reach = ((1 << bits) - 2 - HEADROOM_STEPS) / STEPS_PER_OCTAVE
    lowest = float(deviation.max()) * 2.0**-reach
    ratio = np.divide(lowest, deviation, out=np.ones_like(deviation), where=deviation > 0)
    return float(cluster_rows @ np.clip(ratio**2, 1, LARGEST_LOSS).sum(1))

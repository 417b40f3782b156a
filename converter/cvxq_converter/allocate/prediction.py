"""Statistics and weights → the curve of rates, sizes and losses, without quantizing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from cvxq_format.codebook import DEPTHS, depth_mask

from cvxq_converter.allocate.allocation import (
    GAUSSIAN_DISTORTION,
    BitAllocation,
    code_bytes,
)
from cvxq_converter.allocate.bias import BIAS_BITS
from cvxq_converter.allocate.plan import MatrixPlan, Sensitivity, group_worth
from cvxq_converter.allocate.scale_width import choose_scale_bits
from cvxq_converter.allocate.sizes import allocate_for_rate, empty_file_header, file_size
from cvxq_converter.measure.curve import Curve, Point
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.correction import Statistics, layers_to_gain_bias
from cvxq_converter.quantize.encode import (
    allocate_with_tables,
    codebook_bytes,
    depth_thresholds,
    overhead_bytes,
)
from cvxq_converter.quantize.iteration import Quantized, empty_result
from cvxq_converter.source.loaded import LoadedModel

STEP = 0.25  # bits per weight between the points of a curve
HIGHEST_RATE = 8.0


@torch.no_grad()
def predict_curve(
    loaded: LoadedModel,
    plans: Sequence[MatrixPlan],
    statistics: Statistics,
    options: ConversionOptions,
    write_empty: Callable[[Path, Quantized], None],
) -> Curve:
    """Allocate at every rate from the smallest on, and add up what the errors will cost.

    plans: of all matrices. statistics: by matrix name; empty for the share of the weights' energy
    that is lost instead of KL. write_empty: writes the file of a result whose groups all have
    depth 0, to learn its size.
    """
    thresholds = depth_thresholds(plans, lambda p: loaded.originals[p.matrix.name], options)
    worths = [p.bounded_worths(options.largest_error, thresholds) for p in plans]
    costs = [_group_costs(p, statistics) for p in plans]
    scale = 0.5 if statistics else 1 / sum(float(c.sum()) for c in costs)
    gained = layers_to_gain_bias(loaded, statistics, options)
    empty = empty_result(plans, thresholds, DEPTHS, gained, options)
    header = empty_file_header(lambda path: write_empty(path, empty))
    scale_bits = choose_scale_bits(plans)
    side = {p.matrix.name: overhead_bytes(p, options, scale_bits) for p in plans}
    bias_bytes = sum(m.weight.shape[0] * BIAS_BITS // 8 for m in gained)
    side_bytes = sum(side.values()) + bias_bytes
    weights = loaded.quantized_weights

    def allocate(rate: float) -> BitAllocation:
        return allocate_with_tables(
            plans,
            lambda depths: allocate_for_rate(
                worths, thresholds, rate, weights, side_bytes + codebook_bytes(scale_bits, depths)
            ),
        )

    points = []
    for rate in _rates(8 * (side_bytes + codebook_bytes(scale_bits, DEPTHS) + 1) / weights):
        found = allocate(rate)
        lost = [
            (c * GAUSSIAN_DISTORTION[d]).sum() for c, d in zip(costs, found.depths, strict=True)
        ]
        sizes = {
            name: side[name] + code_bytes(d, w.group_bytes)
            for name, d, w in zip(side, found.depths, worths, strict=True)
        }
        stored = found.stored_depths
        book_size = codebook_bytes(scale_bits, stored)
        book = replace(header.codebooks[0], level_depths=depth_mask(stored), size=book_size)
        size = file_size(replace(header, codebooks=(book,)), sizes)
        points.append(Point(rate, size, scale * sum(lost)))
    return Curve(tuple(points))


def _rates(lowest: float) -> list[float]:
    """The lowest rate and every multiple of `STEP` between it and `HIGHEST_RATE`."""
    multiples = np.arange(0, HIGHEST_RATE + STEP / 2, STEP)
    return [lowest, *(float(rate) for rate in multiples if rate > lowest)]


def _group_costs(plan: MatrixPlan, statistics: Statistics) -> np.ndarray:
    """(C, K) float64 loss, but for a common factor, if a group were set to its mean."""
    variance = plan.deviation().double().square().cpu().numpy()
    rows = plan.clustering.cluster_rows[:, None]
    stats = statistics.get(plan.matrix.name)
    if stats is None:
        return rows * variance * plan.row_scales.mean_squares(plan.clustering)[:, None]
    sensitivity = Sensitivity.from_statistics(stats).of_normalized(plan.row_scales)
    worth = group_worth(variance, sensitivity, plan.clustering)
    return np.asarray(rows * np.exp2(2 * worth))

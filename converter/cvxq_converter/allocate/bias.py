"""Bias correction: b ← b − (Wq − W) x̄.

Quantization moves the mean of a layer's output by (Wq − W) x̄, with x̄ the mean input over the
calibration sequences; the bias takes it back. A layer without a bias gains one only where that
pays: its 16 bits per output count in the rate like everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cvxq_converter.measure.sums import MatrixStatistics, Statistics
from cvxq_converter.source.matrices import Matrix

BIAS_BITS = 16
_PIECE = 1 << 24  # weights multiplied together


def layers_to_gain_bias(matrices: Sequence[Matrix], statistics: Statistics) -> list[Matrix]:
    """The matrices without a bias for which a new one pays."""
    return [
        m
        for m in matrices
        if m.bias_name is not None
        and not m.has_bias
        and m.name in statistics
        and gained_bias_pays(statistics[m.name])
    ]


def gained_bias_pays(stats: MatrixStatistics) -> bool:
    """Whether a new bias for this matrix earns more than its bits spent on depth.

    With errors spread so that every input column costs the same, correcting the mean removes the
    share ρ = mean over columns of x̄² / E[x²] of the output error; the same comes from
    ½ log2(1 / (1 − ρ)) bits per weight, and the bias costs 16 / K.
    """
    if stats.input_mean is None or stats.input_second_moment is None:
        return False
    mean = stats.input_mean.astype(np.float64)
    second = stats.input_second_moment.astype(np.float64)
    used = second > 0
    if not used.any():
        return False
    share = min(float((mean[used] ** 2 / second[used]).mean()), 1 - 1e-6)
    return -0.5 * np.log2(1 - share) > BIAS_BITS / len(mean)


def output_shift(
    weight: torch.Tensor, quantized: torch.Tensor, input_mean: np.ndarray
) -> torch.Tensor:
    """(N,) float32 mean of the output error, (Wq − W) x̄.

    weight, quantized: (N, K); input_mean: (K,).
    """
    mean = torch.from_numpy(input_mean).to(weight.device, torch.float32)
    step = max(1, _PIECE // weight.shape[1])  # a table in float32 is large
    original = torch.cat([piece.float() @ mean for piece in weight.split(step)])
    return quantized.float() @ mean - original

"""The gain: undoing the shrinkage of a least-squares quantizer.

A quantizer of least squared error shrinks what it quantizes, ⟨w, wq⟩ < ⟨w, w⟩. The loss is
correlated with the signal and adds up over the layers. Multiplying the levels of depth B by
(⟨w, w⟩ / ⟨w, wq⟩)^p undoes it; codes are chosen before, with the unscaled levels. How much to undo
depends on the model, so p is chosen by the KL divergence on calibration sequences. Being folded
into the level tables, the gain costs nothing in the file or in the kernels.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from cvxq_format import Codebook

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
FALLBACK_EXPONENT = 0.5  # without sequences to choose by
LARGEST_RATIO = 2.0


def shrinkage_ratios(
    energies: Sequence[np.ndarray], projections: Sequence[np.ndarray]
) -> np.ndarray:
    """(9,) float64 ⟨w, w⟩ / ⟨w, wq⟩ by bit depth, pooled over the matrices; 1 where unused."""
    energy, projection = np.sum(energies, axis=0), np.sum(projections, axis=0)
    ratio = np.divide(energy, projection, out=np.ones(9), where=projection > 0)
    return np.clip(ratio, 1 / LARGEST_RATIO, LARGEST_RATIO)


def with_gain(codebook: Codebook, ratios: np.ndarray, exponent: float) -> Codebook:
    """The codebook with the levels of each depth B multiplied by ratios[B] ** exponent.

    Tables that the file does not hold stay the compander's.
    """
    levels = tuple(
        (table.astype(np.float64) * ratios[depth] ** exponent).astype(np.float32)
        if depth in codebook.stored_depths
        else table
        for depth, table in enumerate(codebook.levels, start=1)
    )
    return replace(codebook, levels=levels)

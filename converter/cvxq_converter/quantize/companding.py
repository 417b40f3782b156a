"""Reconstruction levels: the compander's, and those fitted to the weights.

A code q of depth B stands for the level ℓ_B(q), in units of its group's scale. The tables are
universal (one per depth), so the decoder never needs a table per group. Two ways to make them:

- the **compander** of the CVXQ paper (Appendix B): the asymptotically optimal map for Laplace
  weights, σ(θ) = ½[1 + sgn θ (1 − exp(−√2|θ|/3))], followed by a uniform 2^B-level quantizer;
- **fitted** tables: Lloyd–Max on the weights themselves, each divided by its group's scale.

Codes are chosen by the nearest level, which for given levels has the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from cvxq_format import Codebook, compander_levels
from cvxq_format.codebook import DEPTHS, logarithmic_scales

from cvxq_converter.allocate.allocation import THRESHOLDS
from cvxq_converter.allocate.scale_width import STEPS_PER_OCTAVE

HISTOGRAM_LIMIT = 12.0  # in units of the scale; the compander's outermost 8-bit level is 13.2
HISTOGRAM_BINS = 1 << 15
LLOYD_STEPS = 200


def default_levels() -> tuple[np.ndarray, ...]:
    """The compander's tables of depths 1 to 8, float32."""
    return tuple(compander_levels(depth) for depth in DEPTHS)


def boundaries(levels: np.ndarray) -> np.ndarray:
    """(2^B − 1,) decision points: half way between neighbouring levels."""
    return (levels[1:] + levels[:-1]) / 2


@dataclass
class LevelHistogram:
    """Counts of |weight / scale| over equal bins, pooled over the groups of one depth."""

    counts: np.ndarray

    @classmethod
    def empty(cls) -> LevelHistogram:
        return cls(np.zeros(HISTOGRAM_BINS, dtype=np.float64))

    def add(self, normalized: torch.Tensor, row_weights: torch.Tensor) -> None:
        """Add weights (n, k) in units of their scale, row by row with weights (n,).

        Signs are dropped: the tables are symmetric.
        """
        bins = (normalized.abs() * (HISTOGRAM_BINS / HISTOGRAM_LIMIT)).long()
        bins.clamp_(max=HISTOGRAM_BINS - 1)
        counted = row_weights.double()[:, None].expand(bins.shape).flatten()
        counts = torch.bincount(bins.flatten(), counted, minlength=HISTOGRAM_BINS)
        self.counts += counts.cpu().numpy()


def fit_levels(histogram: LevelHistogram, depth: int) -> np.ndarray:
    """Lloyd–Max levels of one depth for the histogram's distribution, made symmetric.

    Starts from the high-rate optimum (point density ∝ density^⅓, Panter and Dite) and alternates
    nearest-level cells and their means. Returns (2^depth,) float32, strictly ascending.
    """
    counts = histogram.counts
    total = counts.sum()
    if total == 0:
        return compander_levels(depth)
    width = HISTOGRAM_LIMIT / len(counts)
    centres = (np.arange(len(counts)) + 0.5) * width
    half = 1 << (depth - 1)

    # A trace of the Laplace density keeps the levels apart where the histogram is empty.
    density = counts / total + 1e-9 * np.exp(-np.sqrt(2) * centres)
    cumulative = np.concatenate([[0.0], np.cumsum(density)])
    moment = np.concatenate([[0.0], np.cumsum(density * centres)])
    spread = np.cumsum(np.cbrt(density))
    levels = np.interp((np.arange(half) + 0.5) / half * spread[-1], spread, centres)
    for _ in range(LLOYD_STEPS):
        edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [HISTOGRAM_LIMIT]])
        mass = np.diff(np.interp(edges / width, np.arange(len(cumulative)), cumulative))
        first = np.diff(np.interp(edges / width, np.arange(len(moment)), moment))
        previous = levels
        levels = np.where(mass > 0, first / np.maximum(mass, 1e-300), levels)
        if np.abs(levels - previous).max() < 1e-7:
            break
    positive = np.maximum.accumulate(levels.astype(np.float32))
    for i in range(1, half):  # equal neighbours can only come from empty cells
        if positive[i] <= positive[i - 1]:
            positive[i] = np.nextafter(positive[i - 1], np.float32(np.inf))
    return np.concatenate([-positive[::-1], positive])


def make_codebook(
    levels: tuple[np.ndarray, ...], scale_bits: int, stored_depths: tuple[int, ...] = DEPTHS
) -> Codebook:
    """One codebook from its parts; stored_depths: of tables that are not the default."""
    return Codebook(
        scale_table=logarithmic_scales(scale_bits, STEPS_PER_OCTAVE),
        depth_thresholds=THRESHOLDS,
        levels=levels,
        stored_depths=stored_depths,
    )

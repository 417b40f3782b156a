"""A scale for every row, so that the rows of a cluster are alike.

Rows are clustered by what a bit spent on them is worth, weights and sensitivity together, so that
a cluster holds small rows that matter much beside large ones that matter little. Their groups
would share a scale. Dividing every row by its own size first, in steps of a quarter octave that
the file keeps in a few bits a row, leaves the groups as uniform as their columns; kernels multiply
the outputs once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from cvxq_format import row_scale_factors

from cvxq_converter.allocate.clustering import Clustering

STEPS_PER_OCTAVE = 4
WIDEST = 6  # bits of a code


@dataclass(frozen=True)
class RowScales:
    """What the rows of one matrix (N, K) are divided by.

    codes: (N,) uint8, source order, in steps below 1; bits: of each code, 0 for no scales.
    """

    codes: np.ndarray
    bits: int

    @classmethod
    def none(cls, rows: int) -> RowScales:
        """All rows as they are."""
        return cls(np.zeros(rows, np.uint8), 0)

    def factors(self) -> np.ndarray:
        """(N,) float32, at most 1."""
        return row_scale_factors(self.codes)

    def mean_squares(self, clustering: Clustering) -> np.ndarray:
        """(C,) float64 mean squared factor of each cluster."""
        stored = self.factors().astype(np.float64)[clustering.permutation] ** 2
        return np.add.reduceat(stored, clustering.bounds[:-1]) / clustering.cluster_rows

    def normalize(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight (N, K) with its rows divided by their factors: itself where there are none."""
        if not self.bits:
            return weight
        factors = torch.from_numpy(self.factors()).to(weight.device)
        return weight.float() / factors[:, None]


def choose_row_scales(mean_square: np.ndarray, columns: int, clustering: Clustering) -> RowScales:
    """The scales that save more bits than they cost.

    mean_square: (N,) float64 of the rows' weights. Codes of b bits cost b / K bits per weight.
    What remains unlike after them costs ½ (log2 E[v] − E[log2 v]) per weight over the mean squares
    v of a cluster's rows: the scale that they share has to span the largest.
    """
    used = mean_square > 0
    if not used.any():
        return RowScales.none(len(mean_square))
    octaves = np.full(len(mean_square), -np.inf)
    octaves[used] = np.log2(mean_square[used]) / 2
    octaves -= octaves.max()
    best, least = RowScales.none(len(mean_square)), np.inf
    for bits in range(WIDEST + 1):
        limit = (1 << bits) - 1
        codes = np.clip(np.round(-octaves * STEPS_PER_OCTAVE), 0, limit).astype(np.uint8)
        rest = octaves + codes / STEPS_PER_OCTAVE
        cost = bits / columns + _unlikeness(rest, clustering)
        if cost < least:
            best, least = RowScales(codes, bits), cost
    return best


def _unlikeness(octaves: np.ndarray, clustering: Clustering) -> float:
    """Bits per weight that rows of these sizes lose by sharing a scale; −∞ is a row of zeros."""
    total = 0.0
    for first, last in zip(clustering.bounds[:-1], clustering.bounds[1:], strict=True):
        rows = octaves[clustering.permutation[first:last]]
        rows = rows[np.isfinite(rows)]
        if len(rows):
            total += len(rows) * (np.log2(np.exp2(2 * rows).mean()) / 2 - rows.mean())
    return total / len(octaves)

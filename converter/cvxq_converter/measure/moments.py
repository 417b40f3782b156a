"""Weighted second moments of what matrices multiply, one (K, K) for each, in scratch files."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvxq_converter.source.matrices import Matrix
from cvxq_converter.source.scratch import Scratch


class InputMoments:
    """H = Σ_t w_t x_t x_tᵀ / tokens of each matrix, (K, K) float32 on the CPU, by name."""

    def __init__(self, scratch: Scratch, tokens: int) -> None:
        self.found: dict[str, Tensor] = {}
        self._scratch, self._tokens = scratch, tokens
        self._held: dict[str, tuple[Matrix, Tensor]] = {}  # on a GPU, until `settle`

    def add(self, matrix: Matrix, rows: Tensor, weights: NDArray[np.float32]) -> None:
        """Add what came to a matrix with one sequence: rows (M, K), each with its weight w_t.

        weights: (L,), of which those after the rows are of no tokens.
        """
        rows = rows.float()
        share = torch.from_numpy(weights[: len(rows)]).to(rows) / self._tokens
        moment = (rows * share[:, None]).T @ rows
        if moment.device.type == "cpu":
            self._of(matrix).add_(moment)
        elif matrix.name in self._held:
            self._held[matrix.name][1].add_(moment)
        else:
            self._held[matrix.name] = matrix, moment

    def settle(self) -> None:
        """Bring what is on a GPU to the files: before another block's turn comes."""
        while self._held:
            matrix, moment = self._held.popitem()[1]
            self._of(matrix).add_(moment.cpu())

    def add_lookups(self, matrix: Matrix, moment: NDArray[np.float32] | None) -> None:
        """Add Σ g gᵀ / tokens over what the look-ups of a table felt."""
        if moment is not None:
            self._of(matrix).add_(torch.from_numpy(moment))

    def _of(self, matrix: Matrix) -> Tensor:
        if matrix.name not in self.found:
            K = matrix.weight.shape[1]
            self.found[matrix.name] = self._scratch.zeros((K, K), torch.float32)
        return self.found[matrix.name]

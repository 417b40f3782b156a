"""A tied matrix: the head's gradient and the embedding's are one gradient, squared as a sum.

Only the tokens of a sequence have a gradient from both uses. So the head's rows of those tokens
wait for the embedding's, and every other row is reduced and freed at once. Between the two come all
blocks, for all sequences: what waits lies in scratch files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvxq_converter.measure.sums import MatrixSums
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.source.scratch import Scratch

Aside = tuple[Tensor, Tensor, Tensor]  # (S, L, K) that waits; (S, N), (S, K) sums of other rows


class TiedRows:
    """The rows that wait, for the sequence at hand or put aside.

    tokens, in every method: (U,) sorted, those of the sequence at hand; n: its place in `aside`.
    """

    def __init__(self, sums: MatrixSums, aside: Aside) -> None:
        self._sums, self.aside = sums, aside
        self._waiting: Tensor | None = None  # (U, K)

    @staticmethod
    def space(matrix: Matrix, sequences: int, length: int, scratch: Scratch) -> Aside:
        """Room for what is put aside of some sequences."""
        (N, K), zeros = matrix.weight.shape, scratch.zeros
        waiting = zeros((sequences, length, K), matrix.parameter.dtype)
        doubles = torch.float64
        return waiting, zeros((sequences, N), doubles), zeros((sequences, K), doubles)

    def hold_back(self, gradient: Tensor, rows: slice, tokens: Tensor) -> None:
        """Take the rows of the tokens out of the head's gradient (rows, K), and leave zeros."""
        if self._waiting is None:
            self._waiting = gradient.new_zeros(len(tokens), gradient.shape[1])
        own = (tokens >= rows.start) & (tokens < rows.stop)
        places = tokens[own] - rows.start
        self._waiting[own] = gradient[places]
        gradient[places] = 0

    def park(self, n: int, tokens: Tensor) -> None:
        """Put a sequence aside: its rows that wait, and the sums of the others."""
        if self._waiting is None:
            return
        waiting, rows, columns = self.aside
        waiting[n, : len(tokens)] = self._waiting
        rows[n], columns[n] = self._sums.sequence_rows, self._sums.sequence_columns
        self._sums.sequence_rows.zero_()
        self._sums.sequence_columns.zero_()
        self._waiting = None

    def take_up(self, n: int, tokens: Tensor) -> None:
        """Go on with a sequence that was put aside."""
        waiting, rows, columns = self.aside
        device = self._sums.sequence_rows.device
        self._waiting = waiting[n, : len(tokens)].to(device, copy=True)
        self._sums.sequence_rows.copy_(rows[n])
        self._sums.sequence_columns.copy_(columns[n])

    def add_lookups(self, rows: Tensor, values: Tensor, tokens: Tensor) -> None:
        """Add the embedding's gradient, `values` of `rows`, to what waits, and reduce the sum."""
        assert self._waiting is not None
        self._waiting.index_add_(0, torch.searchsorted(tokens, rows), values)
        self._sums.add(self._waiting, tokens)
        self._waiting = None

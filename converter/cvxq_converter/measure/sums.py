"""Sums over gradients and inputs, kept in float64, small enough to keep for every matrix at once.

A gradient is squared a bounded piece at a time, so that no second copy of it is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cvxq_converter.errors import ConversionError
from cvxq_converter.source.matrices import Matrix

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}  # weights squared at once, in float64


@dataclass(frozen=True)
class MatrixStatistics:
    """Sensitivities of one matrix (outputs N, inputs K), per token.

    row_sensitivity[n] = mean over sequences of Σ_k g_nk² / tokens; columns alike with Σ_n.
    Evidence counts sequences; input_mean is None for a matrix that multiplies no input.
    token_weights[s, t] = Σ_n of the squared gradient of output n at that token. lookup_moment =
    Σ g gᵀ / tokens over what a table's look-ups felt. Each is None where there is no such use.
    routed_tokens: how many tokens of each sequence came to an expert, the others' weights being 0
    at the end; None for a matrix that all tokens come to.
    """

    row_sensitivity: NDArray[np.float64]  # (N,)
    column_sensitivity: NDArray[np.float64]  # (K,)
    row_evidence: NDArray[np.int64]  # (N,)
    column_evidence: NDArray[np.int64]  # (K,)
    input_mean: NDArray[np.float32] | None  # (K,)
    input_second_moment: NDArray[np.float32] | None  # (K,)
    sequences: int
    token_weights: NDArray[np.float32] | None = None  # (S, L)
    lookup_moment: NDArray[np.float32] | None = None  # (K, K)
    routed_tokens: NDArray[np.int64] | None = None  # (S,)


Statistics = Mapping[str, MatrixStatistics]  # by matrix name


def _row_chunks(gradient: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, squares in float64) of a (N, K) gradient, a bounded piece at a time."""
    rows = max(1, _CHUNK.get(gradient.device.type, 1 << 20) // gradient.shape[1])
    for start in range(0, gradient.shape[0], rows):
        piece = slice(start, min(start + rows, gradient.shape[0]))
        yield piece, gradient[piece].to(torch.float64).square_()


class AxisSums:
    """Row and column sums of one matrix, over sequences."""

    def __init__(self, matrix: Matrix) -> None:
        N, K = matrix.weight.shape
        device = matrix.parameter.device
        self.name = matrix.name
        self.rows = torch.zeros(N, dtype=torch.float64, device=device)
        self.columns = torch.zeros(K, dtype=torch.float64, device=device)
        self.row_evidence = torch.zeros(N, dtype=torch.int64, device=device)
        self.column_evidence = torch.zeros(K, dtype=torch.int64, device=device)
        self.sequence_rows = torch.zeros_like(self.rows)
        self.sequence_columns = torch.zeros_like(self.columns)
        self.lookups: Tensor | None = None

    def add_lookups(self, gradient: Tensor) -> None:
        """Take the gradients (U, K) of the rows that one sequence looked up."""
        moment = gradient.float().T @ gradient.float()
        self.lookups = moment if self.lookups is None else self.lookups.add_(moment)

    def add(self, gradient: Tensor, rows: Tensor | None = None) -> None:
        """Take a (N, K) gradient, or one whose row i belongs to row `rows[i]` of the matrix."""
        for piece, squares in _row_chunks(gradient):
            where = piece if rows is None else rows[piece]
            self.sequence_rows[where] += squares.sum(1)
            self.sequence_columns += squares.sum(0)

    def end_sequence(self, felt: Tensor | None) -> None:
        """Close a sequence; `felt` (N,) bool limits the rows that count as evidence."""
        if not torch.isfinite(self.sequence_columns.sum()):
            raise ConversionError(
                f"{self.name}: its gradient is not finite; use --dtype bfloat16 or float32"
            )
        seen = self.sequence_rows > 0
        self.row_evidence += seen if felt is None else seen & felt
        self.column_evidence += self.sequence_columns > 0
        self.rows += self.sequence_rows
        self.columns += self.sequence_columns
        self.sequence_rows.zero_()
        self.sequence_columns.zero_()

    def finish(
        self, sequences: int, length: int, mean: InputMean | None, felt: TokenWeights | None
    ) -> MatrixStatistics:
        """Turn sums into per-token means."""
        tokens = sequences * length
        lookups = None if self.lookups is None else (self.lookups / tokens).cpu().numpy()
        return MatrixStatistics(
            row_sensitivity=(self.rows / tokens).cpu().numpy(),
            column_sensitivity=(self.columns / tokens).cpu().numpy(),
            row_evidence=self.row_evidence.cpu().numpy(),
            column_evidence=self.column_evidence.cpu().numpy(),
            input_mean=None if mean is None else mean.value(),
            input_second_moment=None if mean is None else mean.second_moment(),
            sequences=sequences,
            token_weights=None if felt is None else felt.value(),
            lookup_moment=lookups,
            routed_tokens=None if mean is None else mean.routed_tokens(tokens),
        )


@dataclass
class InputMean:
    """Mean and mean square of a module's input over all its tokens."""

    total: Tensor | None = None
    squares: Tensor | None = None
    counts: list[int] = field(default_factory=list)  # of tokens, by call

    def add(self, _module: nn.Module | None, inputs: tuple[Any, ...]) -> None:
        """Forward pre-hook: add the input (…, K)."""
        rows = inputs[0].detach().flatten(0, -2)
        sums = rows.sum(0, dtype=torch.float64)
        squares = rows.float().square().sum(0, dtype=torch.float64)
        self.total = sums if self.total is None else self.total + sums
        self.squares = squares if self.squares is None else self.squares + squares
        self.counts.append(rows.shape[0])

    def value(self) -> NDArray[np.float32] | None:
        """Return the mean (K,), or None if the module saw no token."""
        return self._mean(self.total)

    def second_moment(self) -> NDArray[np.float32] | None:
        """Return the mean square (K,), or None if the module saw no token."""
        return self._mean(self.squares)

    def _mean(self, total: Tensor | None) -> NDArray[np.float32] | None:
        tokens = sum(self.counts)
        return (total / tokens).float().cpu().numpy() if total is not None and tokens else None

    def routed_tokens(self, tokens: int) -> NDArray[np.int64] | None:
        """Return the tokens of each call, or None if they are all `tokens` that there were."""
        return None if sum(self.counts) == tokens else np.array(self.counts, np.int64)


class TokenWeights:
    """How much the loss feels the outputs of a module, (S, L) float32, zero where it never ran.

    An expert's are those of the tokens that came to it, in their order, and zero after them.
    """

    def __init__(self, sequences: int, length: int) -> None:
        self.values = np.zeros((sequences, length), np.float32)
        self.is_empty = True

    def add(self, sequence: int, gradient: Tensor) -> None:
        """Take the gradient (…, N) of a module's output for the tokens of one sequence."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gradient.flatten(0, -2), dim=-1, dtype=wide)
        self.values[sequence, : len(norm)] = norm.square_().float().cpu().numpy()
        self.is_empty = False

    def value(self) -> NDArray[np.float32] | None:
        """Return (S, L), or None if the module never ran."""
        return None if self.is_empty else self.values

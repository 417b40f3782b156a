"""What feedback needs to know of a matrix: which errors of its rows cancel in the output.

The loss of an error δ in one row is to second order ½ δᵀ F δ, with F the row's Fisher information,
(K, K). Pooled over the rows of the matrix it is

    H = E_t[ w_t x_t x_tᵀ ] + E_t[ g_t g_tᵀ ]

The first term is for a matrix that multiplies inputs x_t: w_t = Σ_n (∂/∂y_tn)² is how much the
loss feels the outputs of token t. (GPTQ has w_t = 1; tokens that nobody attends to count as much
as any.) The second is for a table whose rows are looked up: g_t is the gradient of what token t
looked up. A tied embedding has both. Measuring gathers H on the way; where the weights w_t were
measured before, one pass forward over the original network does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvxq_converter.errors import ConversionError
from cvxq_converter.journal import Journal
from cvxq_converter.measure.experts import PRIOR_TOKENS, pooled_hessian
from cvxq_converter.measure.sums import MatrixStatistics, Statistics
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Done

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it
SMALLEST_SHARE = 1e-6  # of a column's input that is taken to remain unexplained


@dataclass(frozen=True)
class InverseFactor:
    """U with (P H Pᵀ + damping)⁻¹ = Uᵀ U, the columns of H being put in the order P.

    order: (K,) int64, falling diagonal of H; factor: (K, K) float32 upper triangular.
    unexplained: (K,) float32, columns as in H: the share of each column's input that those after
    it in the order cannot make up for.
    """

    order: torch.Tensor
    factor: torch.Tensor
    unexplained: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, tokens: float = math.inf) -> InverseFactor:
        """Factor a Hessian (K, K), symmetric and positive semi-definite, known from some tokens.

        H reversed in both axes has the Cholesky factor L; L reversed again is the upper factor R
        of H = R Rᵀ, and U = R⁻¹. Columns without any input keep the damping alone on their
        diagonal: their errors concern nobody.
        """
        diagonal = hessian.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True)
        ordered = hessian[order][:, order].double()
        _shrink_to_diagonal(ordered, tokens)
        damping = DAMPING * float(diagonal.double().mean())
        ordered.diagonal().add_(damping if damping > 0 else 1.0)
        damped = ordered.diagonal().clone()
        # Each step lets go of what it was made from: K² of float64 are large.
        ordered = ordered.flip(0, 1)
        ordered = torch.linalg.cholesky(ordered)
        upper = ordered.flip(0, 1)
        del ordered
        identity = torch.eye(len(order), dtype=torch.float64, device=hessian.device)
        factor = torch.linalg.solve_triangular(upper, identity, upper=True)
        del identity
        unexplained = torch.empty_like(diagonal)
        unexplained[order] = (upper.diagonal().square() / damped).float()
        del upper
        return cls(order, factor.float().contiguous(), unexplained)


def _shrink_to_diagonal(hessian: Tensor, tokens: float) -> None:
    """Take from the off-diagonals of H (K, K), in place, what so few tokens cannot tell.

    With r the correlations, a sample's r_ij from n tokens has the variance (1 + r_ij²) / n, or
    nearly so. The error of (1 − ρ) r is least for ρ = Σ (1 + r²) / n ÷ Σ r², summed over i ≠ j
    (Ledoit and Wolf; Schäfer and Strimmer).
    """
    diagonal = hessian.diagonal().clone()
    used = int((diagonal > 0).sum())
    root = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    squares = float((hessian * root).mul_(root[:, None]).square_().sum()) - used
    if squares > 0:
        hessian *= 1 - min(1.0, (used * (used - 1) + squares) / (tokens * squares))
        hessian.diagonal().copy_(diagonal)


def effective_tokens(weights: NDArray[np.float32]) -> float:
    """How many tokens of equal weight tell as much as those of these: (Σ w)² / Σ w² (Kish)."""
    wide = weights.astype(np.float64)
    return float(wide.sum() ** 2 / max(np.square(wide).sum(), 1e-300))


class Hessians(Protocol):
    """Where the Hessians of matrices come from, and from how many tokens."""

    tokens: int

    def parts(self) -> list[list[str]]:
        """Names of the matrices whose Hessians may be there together, in the order to ask in."""

    def hessian(self, name: str) -> Tensor | None:
        """H (K, K) of a matrix; None for one that nothing was measured of."""

    def forget(self, name: str) -> None:
        """Give up that of a matrix: its factor is there."""


class Feedback:
    """The inverse factors of a network's Hessians, by matrix.

    statistics: of the same sequences. hessians: of all matrices. Factors are steps of the journal,
    made when first asked for. Where Hessians come in parts, so do factors: `prepare` those of a
    part, which are there until `release`.
    Raises ConversionError for inputs so large that their squares are not finite.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        statistics: Statistics,
        hessians: Hessians,
        journal: Journal | None = None,
    ) -> None:
        self._loaded, self._statistics, self._hessians = loaded, statistics, hessians
        self._journal = journal or Journal()
        self._matrices = {matrix.name: matrix for matrix in loaded.matrices}
        self.parts = hessians.parts()

    def knows(self, name: str) -> bool:
        """Whether enough was measured of a matrix for a factor."""
        found = self._statistics.get(name)
        return found is not None and not (
            found.token_weights is None and found.lookup_moment is None
        )

    def factor(self, name: str) -> InverseFactor | None:
        """The factor for one matrix; None for one that nothing was measured of."""
        stored = self._journal.step(name, lambda: self._make(self._matrices[name]))
        self._hessians.forget(name)
        if stored is None:
            return None
        device = self._matrices[name].parameter.device
        return replace(stored, order=stored.order.to(device), factor=stored.factor.to(device))

    def prepare(self, names: Iterable[str], progress: Done | None = None) -> dict[str, Tensor]:
        """Make the factors of matrices of one part, unless they are there; the ranks divide them.

        progress: is told how many of them are there. Returns what each leaves unexplained, (K,).
        """
        names, unexplained = list(names), {}
        lacking = self._journal.lacking(names)
        for pool in dict.fromkeys(self._matrices[name].pool for name in lacking):
            self._pool(pool)
        for name in lacking:  # every rank has it before one makes its factor
            self._hessians.hessian(name)
        make = [partial(self._make, self._matrices[name]) for name in names]
        for name, made in zip(names, self._journal.each(names, make, progress), strict=True):
            self._hessians.forget(name)
            if made is not None:
                unexplained[name] = made.unexplained.cpu().clone()
        return unexplained

    def release(self, names: Iterable[str]) -> None:
        """Give up factors, where they are not all there for good."""
        if len(self.parts) > 1:
            self._journal.drop(*names)

    def _pool(self, pool: str | None) -> Tensor | None:
        """What the Hessians of a pool's experts lend to each of them."""
        if pool is None:
            return None
        names = [m.name for m in self._loaded.matrices if m.pool == pool]

        def add_up() -> Tensor | None:
            pooled = pooled_hessian(names, self._hessians.hessian, self._statistics)
            return None if pooled is None else self._loaded.streamed.scratch.copy(pooled)

        return self._journal.step(f"pool.{pool}", add_up, together=True)

    def _make(self, matrix: Matrix) -> InverseFactor | None:
        pooled, hessian = self._pool(matrix.pool), self._hessians.hessian(matrix.name)
        if hessian is None:
            return None
        if pooled is not None:
            hessian = hessian + pooled
        if not bool(torch.isfinite(hessian).all()):
            dtype = str(matrix.parameter.dtype).removeprefix("torch.")
            raise ConversionError(
                f"{matrix.name}: the squares of its inputs are not finite in {dtype}; "
                "convert with --dtype float32, or use other calibration text"
            )
        made = InverseFactor.of(hessian.to(matrix.parameter.device), self._tokens(matrix))
        return replace(made, factor=self._loaded.streamed.scratch.copy(made.factor))

    def _tokens(self, matrix: Matrix) -> float:
        """How many tokens of equal weight the Hessian of a matrix comes from."""
        weights = self._statistics[matrix.name].token_weights
        known = float(self._hessians.tokens) if weights is None else effective_tokens(weights)
        return max(1.0, known + (PRIOR_TOKENS if matrix.pool is not None else 0))

    def foresee(
        self, statistics: Statistics, progress: Done | None = None
    ) -> dict[str, MatrixStatistics]:
        """Statistics for the allocation: columns whose errors others make up for count for less.

        By the root of what remains unexplained, and within each matrix only: docs/decisions/0005.
        """
        foreseen, total, before = dict(statistics), sum(map(len, self.parts)), 0
        for n, part in enumerate(self.parts):
            done = None if progress is None else partial(_counted, progress, before, total)
            step = partial(self._unexplained, part, done)
            for name, unexplained in self._journal.step(f"shares.{n}", step, together=True).items():
                share = unexplained.clamp(SMALLEST_SHARE, 1).double().sqrt()
                columns = statistics[name].column_sensitivity * share.numpy()
                foreseen[name] = replace(statistics[name], column_sensitivity=columns)
            before += len(part)
        return foreseen

    def _unexplained(self, names: list[str], progress: Done | None) -> dict[str, Tensor]:
        """(K,) of each matrix; its factor stays only where all may."""
        found = self.prepare(names, progress)
        self.release(names)
        return found


def _counted(progress: Done, before: int, total: int, done: int, _: int) -> None:
    """Tell of a part as of the whole."""
    progress(before + done, total)

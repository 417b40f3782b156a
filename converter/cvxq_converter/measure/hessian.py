"""What feedback needs to know of a matrix: which errors of its rows cancel in the output.

The loss of an error δ in one row is to second order ½ δᵀ F δ, with F the row's Fisher information,
(K, K). Pooled over the rows of the matrix it is

    H = E_t[ w_t x_t x_tᵀ ] + E_t[ g_t g_tᵀ ]

The first term is for a matrix that multiplies inputs x_t: w_t = Σ_n (∂/∂y_tn)² is how much the
loss feels the outputs of token t. (GPTQ has w_t = 1; tokens that nobody attends to count as much
as any.) The second is for a table whose rows are looked up: g_t is the gradient of what token t
looked up. A tied embedding has both. Measuring gathers H on the way (`InputMoments`); where the
weights w_t were measured before, one pass forward over the original network does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.experts import pool_hessians
from cvxq_converter.measure.moments import InputMoments
from cvxq_converter.measure.sums import MatrixStatistics, Statistics
from cvxq_converter.source.exactness import as_streamed
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
    def of(cls, hessian: torch.Tensor) -> InverseFactor:
        """Factor a Hessian (K, K), symmetric and positive semi-definite.

        H reversed in both axes has the Cholesky factor L; L reversed again is the upper factor R
        of H = R Rᵀ, and U = R⁻¹. Columns without any input keep the damping alone on their
        diagonal: their errors concern nobody.
        """
        diagonal = hessian.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True)
        ordered = hessian[order][:, order].double()
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


class Feedback:
    """The inverse factors of a network's Hessians, by matrix, made when first asked for.

    sequences: (S, L) int64, those that `statistics` were measured on. moments: the Hessians, where
    measuring gathered them; else one pass over the original weights does, which it leaves in the
    network. A factor takes the place of its Hessian, in a scratch file, so that further
    quantizations of the same model find it. Raises ConversionError for inputs so large that their
    squares are not finite.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sequences: Tensor,
        statistics: Statistics,
        moments: InputMoments | None = None,
    ) -> None:
        self._loaded = loaded
        self._sequences = sequences
        self._statistics = statistics
        self._moments = moments
        self._matrices = {matrix.name: matrix for matrix in loaded.matrices}
        self._pooled: set[str] = set()
        self._factors: dict[str, InverseFactor] = {}
        self._foresights: dict[str, NDArray[np.float64]] = {}

    def factor(self, name: str) -> InverseFactor | None:
        """The factor for one matrix; None for one that nothing was measured of."""
        if self._moments is None:
            self._loaded.restore()
            streamed, statistics = self._loaded.streamed, self._statistics
            self._moments = InputMoments(streamed.scratch, self._sequences.numel())
            input_hessians(
                streamed, self._loaded.matrices, self._sequences, statistics, self._moments
            )
        if name not in self._factors and name in self._moments.found:
            self._pool(self._matrices[name].pool, self._moments)
            self._factors[name] = self._make(self._matrices[name], self._moments.found[name])
        if name not in self._factors:
            return None
        stored, device = self._factors[name], self._matrices[name].parameter.device
        return replace(stored, order=stored.order.to(device), factor=stored.factor.to(device))

    def _pool(self, pool: str | None, moments: InputMoments) -> None:
        """Let the Hessians of a pool's experts help each other, before one becomes a factor."""
        if pool is not None and pool not in self._pooled:
            members = [m for m in self._loaded.matrices if m.pool == pool]
            pool_hessians(members, moments.found, self._statistics)
            self._pooled.add(pool)

    def _make(self, matrix: Matrix, hessian: Tensor) -> InverseFactor:
        if not bool(torch.isfinite(hessian).all()):
            dtype = str(matrix.parameter.dtype).removeprefix("torch.")
            raise ConversionError(
                f"{matrix.name}: the squares of its inputs are not finite in {dtype}; "
                "convert with --dtype float32, or use other calibration text"
            )
        made = InverseFactor.of(hessian.to(matrix.parameter.device))
        return replace(made, factor=hessian.copy_(made.factor))

    def foresee(
        self, statistics: Statistics, progress: Done | None = None
    ) -> dict[str, MatrixStatistics]:
        """Statistics for the allocation: columns whose errors others make up for count for less.

        By the root of what remains unexplained, and within each matrix only: docs/decisions/0005.
        """
        foreseen = dict(statistics)
        for done, (name, stats) in enumerate(statistics.items(), start=1):
            if name not in self._foresights:
                factor = self.factor(name)
                if factor is not None:
                    share = factor.unexplained.clamp(SMALLEST_SHARE, 1)
                    self._foresights[name] = share.double().sqrt().cpu().numpy()
            if name in self._foresights:
                columns = stats.column_sensitivity * self._foresights[name]
                foreseen[name] = replace(stats, column_sensitivity=columns)
            if progress is not None:
                progress(done, len(statistics))
        return foreseen


@torch.no_grad()
def input_hessians(
    network: Any,
    matrices: list[Matrix],
    sequences: Tensor,
    statistics: Statistics,
    moments: InputMoments,
) -> None:
    """Gather H of each matrix that has statistics by running the network, whole or by blocks."""
    streamed = as_streamed(network)
    last_stage = len(streamed.blocks)
    multiplied = [m for m in matrices if _weights(m, statistics) is not None]
    head = next((m for m in multiplied if streamed.is_head(m.input_module_name)), None)

    @contextmanager
    def watching(is_at: Callable[[int], bool]) -> Iterator[None]:
        chosen = [m for m in multiplied if m is not head and m.input_module_name is not None]
        hooks = [
            streamed.network.get_submodule(m.input_module_name).register_forward_pre_hook(seen(m))
            for m in chosen
            if is_at(streamed.stage_of(m.input_module_name or ""))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def seen(matrix: Matrix) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: add(matrix, inputs[0].flatten(0, -2))

    def add(matrix: Matrix, rows: Tensor) -> None:
        weights = _weights(matrix, statistics)
        assert weights is not None
        moments.add(matrix, rows, weights[streamed.sequence])

    with streamed.opened():
        with watching(lambda stage: 0 <= stage < last_stage):
            states = streamed.forward(sequences, keep=False, after_block=moments.settle)
        for s, ids in enumerate(sequences):
            if streamed.blocks:
                with watching(lambda stage: stage < 0):
                    streamed.call(0, s, ids)
            last = states[-1][s][None].to(streamed.device) if states else None
            with watching(lambda stage: stage == last_stage):
                x = streamed.head_input(s, ids, last)
            if head is not None:
                add(head, x[0])
    moments.settle()
    for matrix in matrices:
        if matrix.name in statistics:
            moments.add_lookups(matrix, statistics[matrix.name].lookup_moment)


def _weights(matrix: Matrix, statistics: Statistics) -> NDArray[np.float32] | None:
    """How much each token's outputs of a matrix count, (S, L)."""
    stats = statistics.get(matrix.name)
    return None if stats is None or matrix.input_module_name is None else stats.token_weights

"""What feedback needs to know of a matrix: which errors of its rows cancel in the output.

The loss of an error δ in one row is to second order ½ δᵀ F δ, with F the row's Fisher information,
(K, K). Pooled over the rows of the matrix it is

    H = E_t[ w_t x_t x_tᵀ ] + E_t[ g_t g_tᵀ ]

The first term is for a matrix that multiplies inputs x_t: w_t = Σ_n (∂/∂y_tn)² is how much the
loss feels the outputs of token t. (GPTQ has w_t = 1; tokens that nobody attends to count as much
as any.) The second is for a table whose rows are looked up: g_t is the gradient of what token t
looked up. A tied embedding has both. The weights w_t come from the measuring pass; the first term
then takes forward passes only, over the original network, for as many matrices at a time as
`MEMORY` holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.experts import pool_hessians
from cvxq_converter.measure.sums import MatrixStatistics, Statistics
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Done

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it
MEMORY = 4 << 30  # bytes of Hessians, float32, held at once; one matrix is always allowed
SMALLEST_SHARE = 1e-6  # of a column's input that is taken to remain unexplained


class _AllSeenError(Exception):
    """Every input that was wanted has been seen: the rest of the forward pass is not needed."""


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
        upper = torch.linalg.cholesky(ordered.flip(0, 1)).flip(0, 1)
        identity = torch.eye(len(order), dtype=torch.float64, device=hessian.device)
        factor = torch.linalg.solve_triangular(upper, identity, upper=True)
        unexplained = torch.empty_like(diagonal)
        unexplained[order] = (upper.diagonal().square() / ordered.diagonal()).float()
        return cls(order, factor.float().contiguous(), unexplained)


class Feedback:
    """The inverse factors of a network's Hessians, by matrix, made when first asked for.

    sequences: (S, L) int64, those that `statistics` were measured on. Asking leaves the original
    weights in the network. Factors stay in memory as long as they fit, so that further
    quantizations of the same model find them. Raises ConversionError for inputs so large that their
    squares are not finite.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sequences: Tensor,
        statistics: Statistics,
        memory: int = MEMORY,
    ) -> None:
        self._loaded = loaded
        self._sequences = sequences
        self._statistics = statistics
        self._memory = memory
        self._factors: dict[str, InverseFactor] = {}
        self._foresights: dict[str, NDArray[np.float64]] = {}

    def factor(self, name: str) -> InverseFactor | None:
        """The factor for one matrix; None for one that nothing was measured of."""
        if name not in self._factors:
            self._prepare(name)
        return self._factors.get(name)

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

    def _prepare(self, name: str) -> None:
        """Make the factors of this matrix and of those that follow, as many as fit."""
        names = [m.name for m in self._loaded.matrices]
        batch: list[Matrix] = []
        used = sum(f.factor.nbytes for f in self._factors.values())
        for matrix in self._loaded.matrices[names.index(name) :]:
            size = 4 * matrix.weight.shape[1] ** 2
            if used + size > self._memory:
                if batch:
                    break
                self._factors.clear()
                used = 0
            used += size
            batch.append(matrix)
        self._loaded.restore()
        sums = input_hessians(self._loaded.network, batch, self._sequences, self._statistics)
        pool_hessians(batch, sums, self._statistics)
        for matrix in batch:
            hessian = sums.pop(matrix.name, None)
            if hessian is None:
                continue
            if not bool(torch.isfinite(hessian).all()):
                dtype = str(matrix.parameter.dtype).removeprefix("torch.")
                raise ConversionError(
                    f"{matrix.name}: the squares of its inputs are not finite in {dtype}; "
                    "convert with --dtype float32, or use other calibration text"
                )
            self._factors[matrix.name] = InverseFactor.of(hessian)


@torch.no_grad()
def input_hessians(
    network: Any,
    matrices: list[Matrix],
    sequences: Tensor,
    statistics: Statistics,
) -> dict[str, Tensor]:
    """H (K, K) float32 of each matrix that has statistics, by name, on the network's device."""
    found: dict[str, Tensor] = {}
    for matrix in matrices:
        stats = statistics.get(matrix.name)
        if stats is not None and stats.lookup_moment is not None:
            moment = torch.tensor(stats.lookup_moment, device=matrix.parameter.device)  # a copy
            found[matrix.name] = moment
    users: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        module, stats = matrix.input_module_name, statistics.get(matrix.name)
        if module is not None and stats is not None and stats.token_weights is not None:
            users.setdefault(module, []).append(matrix)
    if not users:
        return found
    seen: set[str] = set()
    current = 0

    def hook(module: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].flatten(0, -2).float()
            for matrix in users[module]:
                weights = statistics[matrix.name].token_weights
                assert weights is not None
                felt = torch.from_numpy(weights[current][: len(rows)])
                share = felt.to(rows) / sequences.numel()
                moment = (rows * share[:, None]).T @ rows
                before = found.get(matrix.name)
                found[matrix.name] = moment if before is None else before.add_(moment)
            seen.add(module)
            if len(seen) == len(users):
                raise _AllSeenError

        return add

    hooks = [network.get_submodule(n).register_forward_pre_hook(hook(n)) for n in users]
    try:
        for current, sequence in enumerate(sequences):  # noqa: B007 (read by the hooks)
            seen.clear()
            with contextlib.suppress(_AllSeenError):
                network(input_ids=sequence[None].to(network.device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found

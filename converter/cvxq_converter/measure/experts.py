"""Hessians of experts that few tokens came to: helped by those of the same layer's others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from cvxq_converter.measure.sums import Statistics
from cvxq_converter.source.matrices import Matrix, names_by_pool

PRIOR_TOKENS = 32  # that the pool's Hessian counts for in each expert's


def pool_hessians(
    matrices: Iterable[Matrix], hessians: Mapping[str, Tensor], statistics: Statistics
) -> None:
    """Add to each expert's Hessian (K, K), in place, what `PRIOR_TOKENS` of its pool's have.

    Pools are made of those of the `matrices` that have a Hessian.
    """
    for names in names_by_pool(matrices, hessians):
        routed = [statistics[name].routed_tokens for name in names]
        tokens = sum(int(counts.sum()) for counts in routed if counts is not None)
        if tokens:
            pooled = hessians[names[0]].clone()
            for name in names[1:]:
                pooled += hessians[name]
            pooled *= PRIOR_TOKENS / tokens
            for name in names:
                hessians[name].add_(pooled)

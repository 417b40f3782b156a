"""Hessians of experts that few tokens came to: helped by those of the same layer's others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from cvxq_converter.measure.sums import Statistics

PRIOR_TOKENS = 32  # that the pool's Hessian counts for in each expert's


def pooled_hessian(
    names: Iterable[str], hessian: Callable[[str], Tensor | None], statistics: Statistics
) -> Tensor | None:
    """What `PRIOR_TOKENS` of a pool's tokens add to the Hessian (K, K) of each of its experts.

    names: of its matrices, of which some may not have been measured. hessian: of one by its name.
    """
    pooled, tokens = None, 0
    for name in names:
        own = hessian(name)
        if own is None:
            continue
        pooled = own.clone() if pooled is None else pooled.add_(own)
        routed = statistics[name].routed_tokens
        tokens += 0 if routed is None else int(routed.sum())
    return pooled.mul_(PRIOR_TOKENS / tokens) if pooled is not None and tokens else None

"""What an expert's bits are worth when calibration hardly came to it.

An expert that no token was routed to is not an insensitive one: other texts will need it. The
matrices that do the same for the experts of one layer are a pool. The sensitivity of one is how
often tokens come to it times how much the loss feels it when they do:

    s_e = t_e / T · q_e

Of t_e tokens, q_e is known the better the more there are: it is shrunk towards its pool as rows
are towards their matrix (`shrinkage`). And t_e counts as half the pool's mean at least, which is
half a bit of depth below. Where in a matrix the loss feels errors is taken from the pool, too, as
far as the expert's own tokens do not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cvxq_converter.allocate.shrinkage import shrink
from cvxq_converter.measure.sums import MatrixStatistics, Statistics
from cvxq_converter.source.matrices import Matrix, names_by_pool

LEAST_SHARE = 0.5  # of the mean tokens of its pool, that each expert counts as routed to
PRIOR_TOKENS = 32  # that the pool's shape counts for in each expert's


def pool_experts(matrices: Sequence[Matrix], statistics: Statistics) -> Statistics:
    """Statistics in which the experts of a pool vouch for each other; others' are unchanged."""
    pooled = dict(statistics)
    for names in names_by_pool(matrices, statistics):
        found = _pool([statistics[name] for name in names])
        pooled |= zip(names, found, strict=True)
    return pooled


def _pool(members: list[MatrixStatistics]) -> list[MatrixStatistics]:
    tokens = np.array([_tokens(member) for member in members])
    totals = np.array([member.row_sensitivity.sum() for member in members])
    if not totals.any():
        return members
    felt = np.divide(totals, tokens, out=np.zeros_like(totals), where=tokens > 0)
    felt = shrink(felt, tokens, int(tokens.max()))
    wanted = felt * np.maximum(tokens, LEAST_SHARE * tokens.mean())
    rows = np.sum([member.row_sensitivity for member in members], axis=0)
    columns = np.sum([member.column_sensitivity for member in members], axis=0)
    return [
        replace(
            member,
            row_sensitivity=_blend(member.row_sensitivity, rows, own) * total,
            column_sensitivity=_blend(member.column_sensitivity, columns, own) * total,
            row_evidence=np.maximum(member.row_evidence, 1),
            column_evidence=np.maximum(member.column_evidence, 1),
        )
        for member, total, own in zip(members, wanted, tokens, strict=True)
    ]


def _tokens(member: MatrixStatistics) -> int:
    if member.routed_tokens is not None:
        return int(member.routed_tokens.sum())
    return 0 if member.token_weights is None else member.token_weights.size


def _blend(own: np.ndarray, pooled: np.ndarray, tokens: int) -> np.ndarray:
    """The shape of `own`, as far as its tokens tell, and of the pool: their sum is 1."""
    shape: np.ndarray = pooled / pooled.sum()
    if own.any():
        share = tokens / (tokens + PRIOR_TOKENS)
        shape = share * own / own.sum() + (1 - share) * shape
    return shape

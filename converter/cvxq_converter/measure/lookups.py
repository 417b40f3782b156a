"""What the loss feels of a table's rows, most of which calibration never looks up.

The network itself says how often it expects each token: x_v = Σ_t p_tv over the calibration's
positions, a smooth count where drawn tokens give 0 or 1. A look-up of any row feels ē, the mean
over all of them, as far as nothing else is known. A row that was looked up, and felt f_v in all, is
known better, and counts for more where a text of another kind has the token often:

    r_v = x_v (f_v + a ē) / (x_v + a),

which is x_v ē for a row that was not looked up, and nears f_v where x_v is large. (It is the mean
of a Poisson number of look-ups with a Gamma prior of weight a about x_v, times that of what each
feels with a prior of a look-ups.) The rows then share what was felt in all.
"""

from __future__ import annotations

from torch import Tensor

PRIOR_LOOKUPS = 2.0  # a


def expect(expected: Tensor, ids: Tensor, following: Tensor) -> None:
    """Add to `expected` (N,) float64 the tokens that one sequence foretells.

    ids: (L,), its own; following: (V,) Σ_t of what was expected after each of them.
    """
    known = min(len(expected), len(following))
    expected[:known] += following[:known] * (1 - 1 / len(ids))
    expected[ids[0]] += 1  # which nothing foretells


def row_squares(felt: Tensor, expected: Tensor, tokens: int) -> Tensor:
    """(N,) float64 r_v, over all tokens; felt, expected: (N,) float64, f_v and x_v."""
    total, a = felt.sum(), PRIOR_LOOKUPS
    rows = expected * (felt + a * total / max(1, tokens)) / (expected + a)
    return rows * (total / rows.sum().clamp_min(1e-300))

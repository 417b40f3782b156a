"""Shrink sensitivities towards a prior fitted on their own matrix, in the log domain.

A row that calibration never felt is not an insensitive row: its sensitivity is unknown. Model the
log sensitivity of row i as drawn from N(m, τ²), and its estimate from n_i sequences as that plus
noise of variance c / n_i. The posterior mean is

    log s_i ← m + (log s_i − m) · n_i / (n_i + ν0),    ν0 = c / τ²,

which is the plain estimate where evidence abounds and exactly the prior, e^m, where n_i = 0.
m is the mean of log s over rows with evidence, and τ² their variance less the noise: empirical
Bayes. c is the variance of the log of one sequence's estimate. A row sum over K weights with one
random sign is close to a scaled χ² of a few degrees of freedom. Measured on a small trained
Llama (48 sequences of 128 tokens): 0.2–0.8 for rows and columns inside blocks, 2 for token rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOISE = 1.0  # c: log variance of one sequence's estimate of a row or column
UNKNOWN = 2.0**-100  # sensitivity of every row of a matrix that nothing was felt through
_SMALLEST_VARIANCE = 1e-3  # of τ²: below a twentieth of a bit of depth, rows are alike


def shrink(
    sensitivity: NDArray[np.float64], evidence: NDArray[np.int64], sequences: int
) -> NDArray[np.float64]:
    """Return strictly positive sensitivities (N,), each as trustworthy as its evidence allows.

    sensitivity: (N,) ≥ 0, means over all sequences; evidence: (N,) how many of the `sequences`
    each row was felt in. Without any evidence every row gets the same tiny constant, `UNKNOWN`:
    nothing tells the rows apart, and nothing says that the matrix matters.
    """
    sensitivity = np.asarray(sensitivity, dtype=np.float64)
    counts = np.where(sensitivity > 0, np.minimum(evidence, sequences), 0).astype(np.float64)
    known = counts > 0
    if not known.any():
        return np.full(sensitivity.shape, UNKNOWN)
    logs = np.log(sensitivity[known])
    mean = logs.mean()
    noise = NOISE / counts[known]
    variance = max(float(logs.var() - noise.mean()), _SMALLEST_VARIANCE)
    shrunk = np.full(sensitivity.shape, mean)
    shrunk[known] = mean + (logs - mean) * variance / (variance + noise)
    return np.exp(shrunk)

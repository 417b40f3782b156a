"""One factor for each output of a matrix, in steps of a quarter octave.

A group's scale is shared by all rows of its cluster; the factor lets a row differ from the others.
Code v stands for 2^(−v/4), which never exceeds 1, so that no weight grows by it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_QUARTERS = np.array(
    [float.fromhex(text) for text in ("0x1p0", "0x1.ae89fap-1", "0x1.6a09e6p-1", "0x1.306fep-1")],
    np.float32,
)
"""2^(−i/4) for i = 0 … 3, rounded to float32; other factors are these, halved exactly."""


def row_scale_factors(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the factors 2^(−code/4) of row scale codes: any shape, uint8 → float32."""
    factors: npt.NDArray[np.float32] = np.ldexp(
        _QUARTERS[codes % 4], -(codes // 4).astype(np.int32)
    )
    return factors

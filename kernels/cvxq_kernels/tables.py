"""What the codes of a companded matrix are looked up in, as every decoder of it needs them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cvxq_format import Codebook, CompandedTensor

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class DecodingTables:
    """Tables of one matrix, all float32.

    scales: (2^s,), the scale table times the matrix's scale unit; means: (256,), the mean of code i
    at [i + 128]; levels: (512,), depth B's table at [2^B, 2^(B+1)), 0 for depth 0.
    """

    scales: Floats
    means: Floats
    levels: Floats


def decoding_tables(tensor: CompandedTensor, codebook: Codebook) -> DecodingTables:
    """Return the tables of `tensor`, whose codebook is `codebook`."""
    return DecodingTables(
        scales=np.float32(tensor.scale_unit) * codebook.scale_table.astype(np.float32),
        means=np.arange(-128, 128, dtype=np.float32) * np.float32(tensor.mean_step),
        levels=joined_levels(codebook),
    )


def joined_levels(codebook: Codebook) -> Floats:
    """All level tables in one, (512,): index 2^B + q holds level q of depth B."""
    # With a level in front, the code of a group counts from a power of two.
    return np.concatenate([np.zeros(1, np.float32), codebook.flat_levels()])

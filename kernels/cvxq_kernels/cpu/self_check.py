"""A product of every bit depth against the formula, before a model's first token.

A kernel that a compiler got wrong, or an instruction set that a processor or an emulator only
claims to have, would otherwise show as odd text.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from cvxq_format import MAX_DEPTH, Codebook, CompandedTensor, dequantize, pack_codes

from cvxq_kernels.cpu.loader import isa
from cvxq_kernels.cpu.matrix import Matrix, Pool, matmul_many

ROWS, COLUMNS = 16, 64  # of one depth
BATCHES = (1, 3, 20)  # tokens: each takes another kernel
# Of the product of the norms of row and input, in units of which rounding is bounded: float32 sums,
# and inputs in int8, of which a right kernel was seen to lose 0.004.
EXACT, FAST = 1e-5, 2e-2


def check_kernels() -> None:
    """Raise RuntimeError, one line, where the kernels in use compute something else."""
    _check(isa())


@cache
def _check(name: str) -> None:
    rng = np.random.default_rng(MAX_DEPTH)
    tensor, book = _tensor(rng), Codebook.default()
    weight = dequantize(tensor, book)
    pool = Pool(1)
    matrix = Matrix.from_tensor(tensor, book, pool=pool)
    for tokens in BATCHES:
        x = rng.standard_normal((tokens, COLUMNS)).astype(np.float32)
        expected = x.astype(np.float64) @ weight.T.astype(np.float64)
        norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
        for exact, most in ((True, EXACT), (False, FAST)):
            error = np.abs(matmul_many([matrix], x, exact, pool)[0] - expected) / norms
            if not (error <= most).all():
                row = int(np.flatnonzero(~(error <= most).all(axis=0))[0])
                raise RuntimeError(
                    f"the compiled CPU kernels compute a wrong product at bit depth {row // ROWS}, "
                    f"{tokens} tokens, with {name}: install cvxq again, built on this machine"
                )


def _tensor(rng: np.random.Generator) -> CompandedTensor:
    """A matrix with a cluster of each depth, 0 to 8, and means."""
    depths = np.repeat(np.arange(MAX_DEPTH + 1, dtype=np.uint8), COLUMNS).reshape(1, -1, COLUMNS)
    levels = 1 << np.repeat(depths, ROWS, axis=1).astype(np.int64)
    codes = (rng.integers(0, 256, levels.shape) % levels).astype(np.uint8)
    return CompandedTensor(
        shape=codes.shape[1:],
        group_size=ROWS,
        partitions=1,
        scale_unit=np.float32(0.1),
        depths=depths,
        scale_codes=rng.integers(8, 56, depths.shape, dtype=np.uint8),
        packed_codes=pack_codes(codes, depths, ROWS, 1),
        mean_step=np.float32(0.005),
        mean_codes=rng.integers(1, 127, depths.shape).astype(np.int8),
    )

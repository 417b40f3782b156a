"""What `matvec` and `gemm` begin with: the program's share of the work."""

from __future__ import annotations

import triton
import triton.language as tl

import cvxq_kernels.gpu.names as names


@triton.jit
def share_of_tile(tiles, runs, order, scales, splits, ROWS: tl.constexpr):
    """What program (tile, split) of a product works on.

    Returns the tile's cluster; its first word, int64; the cluster's first chunk, its order, scales
    and row of `runs`; and which of the cluster's chunks, [first, last), are the split's.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    info = tiles + tile * names.TILE_FIELDS
    cluster = tl.load(info + names.CLUSTER)
    base = tl.load(info + names.WORD_BASE).to(tl.int64) * ROWS
    chunk_base = tl.load(info + names.CHUNK_BASE)
    order += tl.load(info + names.ORDER_BASE)
    scales += tl.load(info + names.MATRIX) * names.SCALES
    ends = runs + cluster * names.RUN_FIELDS
    begin = tl.load(ends + 1)  # chunks of depth 0 have no words
    count = tl.load(ends + names.RUN_END) - begin
    first = begin + count * split // splits
    last = begin + count * (split + 1) // splits
    return cluster, base, chunk_base, order, scales, ends, first, last


@triton.jit
def hidden_zeros(target):
    """Zeros, which ptxas cannot see, from outputs `target` ≥ −1.

    Tables that it proves equal for all lanes go to uniform registers, from which it moves them back
    for every look-up (0.2 instructions per weight).
    """
    return tl.minimum(target, -1) + 1

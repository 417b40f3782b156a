"""What `matvec` and `gemm` begin with: the program's share of the work."""

from __future__ import annotations

import triton
import triton.language as tl

import cvxq_kernels.gpu.names as names


@triton.jit
def read_item(items):
    """Return the fields of the program's item but its counts; see `Shares`."""
    item = items + tl.program_id(0) * names.ITEM_FIELDS
    return (
        tl.load(item + names.ITEM_TILE),
        tl.load(item + names.ITEM_CLUSTER),
        tl.load(item + names.ITEM_PART),
        tl.load(item + names.ITEM_PARTS),
        tl.load(item + names.ITEM_SUMS),
        tl.load(item + names.ITEM_CHUNK),
        tl.load(item + names.ITEM_SLOT),
        tl.load(item + names.ITEM_WORD),
        tl.load(item + names.ITEM_ORDER),
        tl.load(item + names.ITEM_MATRIX),
    )


@triton.jit
def chunks_of_depth(items, DEPTH: tl.constexpr):
    """How many chunks of DEPTH the program has."""
    pair = tl.load(items + tl.program_id(0) * names.ITEM_FIELDS + names.ITEM_COUNTS + DEPTH // 2)
    return (pair >> (names.COUNT_BITS * (DEPTH % 2))) & names.COUNT_MASK


@triton.jit
def hidden_zeros(target):
    """Zeros, which ptxas cannot see, from outputs `target` ≥ −1.

    Tables that it proves equal for all lanes go to uniform registers, from which it moves them back
    for every look-up (0.2 instructions per weight).
    """
    return tl.minimum(target, -1) + 1

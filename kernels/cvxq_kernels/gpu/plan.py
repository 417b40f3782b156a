"""How one multiplication is launched, and what is launched when nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PROGRAMS_PER_PROCESSOR = 16  # warps that hide the latency of memory, where there is work for them
MATVEC_ROWS = 8  # rows of x that `matvec` takes at a time
MATVEC_BATCH = 4  # the largest batch for which it is considered: tensor cores take over from there
UNROLLS = (1, 2)  # of a matvec; for several rows 1, as compiling takes minutes otherwise
SUMS_OF_A_WARP = 2048  # 64 registers of a lane
GEMM_ROWS = 256  # rows of x that `gemm` takes at a time

# Sizes that no kernel gains from knowing: without this, Triton compiles anew for many of them.
NOT_SPECIALIZED = ("x_stride", "batch", "clusters", "out_stride", "slots", "tile_count")


@dataclass(frozen=True)
class Plan:
    """One way to multiply.

    kind: the kernel, see `weight`; "matvec16" is never the fastest, and so never chosen unasked.
    programs: about so many, see `shares`; of gemm for each `tile_batch` rows of x, a power of two
    from 16. unroll: of the loops of matvec.
    """

    kind: Literal["matvec", "matvec16", "gemm", "expand"]
    programs: int = 1
    unroll: int = 2
    tile_batch: int = 16


def choose_plan(batch: int, processors: int) -> Plan:
    """Guess a plan for `batch` rows of x; what `tune` measures takes its place."""
    programs = processors * PROGRAMS_PER_PROCESSOR
    if batch <= MATVEC_BATCH:
        return Plan("matvec", programs, UNROLLS[batch == 1])
    if batch <= 64:
        return Plan("gemm", programs // 2, 1, max(16, bucket(batch)))
    return Plan("expand")


def gemm_warps(rows: int, tile_batch: int) -> int:
    """Warps of a program of gemm, as few as hold its sums in registers.

    rows: of a tile.  With more warps each would do more of the same: look-ups of the same words.
    """
    return max(1, rows * tile_batch // SUMS_OF_A_WARP)


def bucket(batch: int) -> int:
    """The power of two that stands for a batch when plans are measured and remembered."""
    return 1 << max(0, batch - 1).bit_length()

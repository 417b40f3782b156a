"""How one multiplication is launched, and what is launched when nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PROGRAMS_PER_PROCESSOR = 16  # warps that hide the latency of memory, where there is work for them
LEAST_CHUNKS = 4  # of a program: fewer do not repay its prologue
MATVEC_ROWS = 8  # rows of x that `matvec` takes at a time
MATVEC_BATCH = 4  # the largest batch for which it is considered: tensor cores take over from there
UNROLLS = (1, 2)  # of a matvec; for several rows 1, as compiling takes minutes otherwise
GEMM_ROWS = 256  # rows of x that `gemm` takes at a time

# Sizes that no kernel gains from knowing: without this, Triton compiles anew for many of them.
NOT_SPECIALIZED = ("x_stride", "batch", "clusters", "out_stride", "slots", "splits")


@dataclass(frozen=True)
class Plan:
    """One way to multiply.

    kind: the kernel, see `weight`; "matvec16" is never the fastest, and so never chosen unasked.
    splits: programs that share a tile's chunks. unroll: of the loops of matvec. tile_batch: rows
    of x per program of gemm, a power of two from 16.
    """

    kind: Literal["matvec", "matvec16", "gemm", "expand"]
    splits: int = 1
    unroll: int = 2
    tile_batch: int = 16


def split_for(tiles: int, chunks: int, processors: int, programs: int) -> int:
    """Programs per tile so that each processor has about `programs`; chunks: of a cluster."""
    wanted = -(-processors * programs // tiles)
    return max(1, min(wanted, chunks // LEAST_CHUNKS))


def choose_plan(batch: int, tiles: int, chunks: int, processors: int) -> Plan:
    """Guess a plan for `batch` rows of x; what `tune` measures takes its place."""
    if batch <= MATVEC_BATCH:
        splits = split_for(tiles, chunks, processors, PROGRAMS_PER_PROCESSOR)
        return Plan("matvec", splits, UNROLLS[batch == 1])
    if batch <= 64:
        tile_batch = 16 if batch <= 16 else 32
        programs = PROGRAMS_PER_PROCESSOR // 2
        return Plan("gemm", split_for(tiles, chunks, processors, programs), 1, tile_batch)
    return Plan("expand")


def bucket(batch: int) -> int:
    """The power of two that stands for a batch when plans are measured and remembered."""
    return 1 << max(0, batch - 1).bit_length()

"""Model the small GEMM beside cuBLAS on GPUs that are not here: python tools/model_gemm.py

    python tools/model_gemm.py [--bits 3 4] [--device H100 …]

The matrices, how they are shared out and what is assumed of memory and launches are those of
`model_gpu.py`; instructions of a chunk and registers are counted in the compiled code.  The kernel
asks for what a turn needs one turn ahead, so that a turn waits for the L2 cache at most.  cuBLAS is
assumed to read float16 weights as fast as a copy, and its arithmetic to cost nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cvxq_kernels.gpu.layout import CLUSTER, LOW_DEPTH, TILE_FIELDS
from cvxq_kernels.gpu.plan import choose_plan
from cvxq_kernels.gpu.shares import GEMM_COSTS, ITEM_PARTS, counts_of, share_out
from model_gpu import (
    COLD_US,
    DEVICES,
    GAP_US,
    ISSUED,
    NEAR_WORDS_US,
    SMALL_US,
    WARM_US,
    WORDS_US,
    Chunks,
    Device,
    chunks_of,
    makespan,
    matrix_bytes,
)
from random_model import SHAPES

# By the rows of input that a program takes: instructions of its warps per chunk of depths 1 … 8 in
# tiles of 64 rows on sm_90, and how many programs the registers of a processor hold.
INSTRUCTIONS = {
    16: (276, 268, 281, 377, 593, 591, 627, 559),
    64: (762, 762, 772, 872, 1134, 1140, 1168, 1088),
}
RESIDENT = {16: 11, 64: 4}  # of kernels for all depths: 178 registers of 32 lanes, 224 of 64

# Item, first entry of a run, its inputs; the tile's rows beside them.  Sums and the counter.
COLD_BEFORE, WARM_AFTER = 3, 2
DEEP_TURNS = 2  # a chunk of depth 5–8 asks for its levels, too


@dataclass(frozen=True)
class Product:
    """One product x · Wᵀ of `batch` rows: µs here and in cuBLAS, and what bounds the loops."""

    name: str
    batch: int
    microseconds: float
    dense_us: float
    bound_us: float
    issue_us: float
    chain_us: float


def shares(chunks: Chunks, programs: int) -> tuple[Chunks, int]:
    """Chunks of every program, in the grid's order, and how many programs share a tile at most."""
    tiles = torch.zeros(len(chunks), TILE_FIELDS, dtype=torch.int32)
    tiles[:, CLUSTER] = torch.arange(len(chunks))
    runs = torch.from_numpy(np.pad(chunks.cumsum(1), ((0, 0), (1, 0))))
    items = share_out(tiles, runs, GEMM_COSTS, programs, with_pruned=False).items.numpy()
    return counts_of(items), int(items[:, ITEM_PARTS].max())


def model_product(
    name: str, outputs: int, inputs: int, bits: float, batch: int, device: Device
) -> Product:
    """Model one product."""
    plan = choose_plan(batch, device.processors)
    width, chunks = plan.tile_batch, chunks_of(outputs, inputs, bits)
    programs, parts = shares(chunks, plan.programs)
    blocks = -(-batch // width)
    programs = np.tile(programs, (blocks, 1))
    issue = programs[:, 1:] @ np.array(INSTRUCTIONS[width])
    low, high = programs[:, 1 : LOW_DEPTH + 1].sum(1), programs[:, LOW_DEPTH + 1 :].sum(1)
    chains = NEAR_WORDS_US * (low + DEEP_TURNS * high)
    per_microsecond = device.processors * ISSUED * device.gigahertz * 1e3
    issue_us = float(issue.sum()) / per_microsecond
    chain_us = makespan(chains, device.processors * RESIDENT[width])
    bound_us = matrix_bytes(chunks, inputs) / device.bandwidth
    sorting = GAP_US + SMALL_US
    outside = GAP_US + WORDS_US + COLD_BEFORE * COLD_US + WARM_US * (WARM_AFTER + parts)
    dense = GAP_US + 2 * outputs * inputs / device.bandwidth
    total = sorting + outside + max(bound_us, issue_us, chain_us)
    return Product(name, batch, total, dense, bound_us, issue_us, chain_us)


def products(bits: float, batch: int, device: Device) -> list[Product]:
    """Model the matrices of a layer of Llama-2-7B."""
    shape = SHAPES["7b"]
    hidden, ffn = shape.hidden, shape.ffn
    sizes = {"qkv": (3 * hidden, hidden), "o": (hidden, hidden)}
    sizes |= {"up": (2 * ffn, hidden), "down": (hidden, ffn)}
    return [model_product(name, *size, bits, batch, device) for name, size in sizes.items()]


def table(
    devices: Sequence[Device], rates: Sequence[float], batches: Sequence[int]
) -> Iterator[str]:
    """Rows of a Markdown table: µs, over those of cuBLAS; the last column for what is measured."""
    yield "| GPU | bits | rows of x | qkv | o | up | down | all, over cuBLAS's | measured |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for device in devices:
        for bits in rates:
            for batch in batches:
                found = products(bits, batch, device)
                cells = " | ".join(f"{p.microseconds:.1f}, {p.dense_us:.1f}" for p in found)
                ours, theirs = (
                    sum(getattr(p, name) for p in found) for name in ("microseconds", "dense_us")
                )
                yield (f"| {device.name} | {bits:g} | {batch} | {cells} | {ours / theirs:.2f} | |")


def main() -> None:
    names = [device.name for device in DEVICES if device.arch >= 90]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="+", default=(3, 4))
    parser.add_argument("--batch", type=int, nargs="+", default=(8, 16, 64))
    parser.add_argument("--device", nargs="+", choices=names, default=names[:1])
    options = parser.parse_args()
    devices = [device for device in DEVICES if device.name in options.device]
    print(*table(devices, options.bits, options.batch), sep="\n")


if __name__ == "__main__":
    main()

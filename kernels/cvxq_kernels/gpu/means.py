"""What the means of a cluster add to its outputs: one number per cluster and row of x."""

from __future__ import annotations

import triton
import triton.language as tl

WIDTH = 8  # chunks that a program works on at a time


@triton.jit
def means_kernel(
    tiles, runs, chunks, order, scale_codes, mean_codes, scales, mean_steps, first_tiles,
    x, x_stride, out, clusters, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[m, c] = Σ_k x[m, k] · S · t over all columns, pruned ones too; grid (clusters, M)."""
    cluster = tl.program_id(0)
    m = tl.program_id(1)
    info = tiles + tl.load(first_tiles + cluster) * 8
    chunk_base = tl.load(info + 2)
    matrix = tl.load(info + 5)
    step = tl.load(mean_steps + matrix)
    lane = tl.arange(0, 32)[None, :]
    total = tl.zeros([WIDTH, 32], tl.float32)
    for start in range(0, tl.load(runs + cluster * 10 + 9), WIDTH):
        chunk = start + tl.arange(0, WIDTH)
        inside = chunk < tl.load(runs + cluster * 10 + 9)
        entry = tl.load(chunks + chunk_base + chunk, mask=inside, other=0)
        valid = lane < (entry & 63)[:, None]
        column = tl.load(order + tl.load(info + 4) + (entry >> 10)[:, None] + lane, valid, 0)
        place = (chunk_base + chunk)[:, None] * 32 + lane
        scale = tl.load(scale_codes + place, valid, 0).to(tl.int32)
        mean = tl.load(mean_codes + place, valid, 0).to(tl.float32) * step
        value = tl.load(x + m * x_stride + column, valid, 0).to(tl.float32)
        total += value * tl.load(scales + matrix * 256 + scale) * mean
    tl.store(out + m * clusters + cluster, tl.sum(tl.sum(total, axis=1), axis=0))

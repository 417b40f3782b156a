"""What the means of a cluster add to its outputs: one number per cluster and row of x."""

from __future__ import annotations

import triton
import triton.language as tl

import cvxq_kernels.gpu.names as names

WIDTH = 8  # chunks that a program works on at a time


@triton.jit
def means_kernel(
    tiles, runs, chunks, order, scale_codes, mean_codes, scales, mean_steps, first_tiles,
    x, x_stride, out, clusters, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[m, c] = Σ_k x[m, k] · S · t over all columns, pruned ones too; grid (clusters, M)."""
    cluster = tl.program_id(0)
    m = tl.program_id(1)
    info = tiles + tl.load(first_tiles + cluster) * names.TILE_FIELDS
    chunk_base = tl.load(info + names.CHUNK_BASE)
    matrix = tl.load(info + names.MATRIX)
    step = tl.load(mean_steps + matrix)
    lane = tl.arange(0, names.CHUNK)[None, :]
    total = tl.zeros([WIDTH, names.CHUNK], tl.float32)
    end = runs + cluster * names.RUN_FIELDS + names.RUN_END
    for start in range(0, tl.load(end), WIDTH):
        chunk = start + tl.arange(0, WIDTH)
        inside = chunk < tl.load(end)
        entry = tl.load(chunks + chunk_base + chunk, mask=inside, other=0)
        valid = lane < (entry & names.WIDTH_MASK)[:, None]
        sorted_columns = order + tl.load(info + names.ORDER_BASE)
        column = tl.load(sorted_columns + (entry >> names.START_SHIFT)[:, None] + lane, valid, 0)
        place = (chunk_base + chunk)[:, None] * names.CHUNK + lane
        scale = tl.load(scale_codes + place, valid, 0).to(tl.int32)
        mean = tl.load(mean_codes + place, valid, 0).to(tl.float32) * step
        value = tl.load(x + m * x_stride + column, valid, 0).to(tl.float32)
        total += value * tl.load(scales + matrix * names.SCALES + scale) * mean
    tl.store(out + m * clusters + cluster, tl.sum(tl.sum(total, axis=1), axis=0))

"""Quantizing with feedback on a GPU: a block of columns in one launch.

What `quantize` and `search` do for one column takes hundreds of small operations, which on a GPU
cost their launches and hardly anything else. Rows of different clusters never meet, so one program
takes one cluster through all the columns of a block, and keeps in registers the errors that later
columns have to make up for. The choices are those of `search`, but for the order of float32 sums.
"""

# mypy: disallow-untyped-defs=False, allow-untyped-calls
# Triton gives the arguments their types when it compiles.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from cvxq_converter.quantize import search

FUSED_BLOCK = 32  # columns of a launch, whose errors stay in registers

_REACH = tl.constexpr(search.TABLE_LIMIT)
_PER_UNIT = tl.constexpr(search.TABLE_CELLS)
_CELLS = tl.constexpr(search.CELLS)
_MEAN_LIMIT = tl.constexpr(search.MEAN_LIMIT)
_MEAN_REACH = tl.constexpr(search.MEAN_REACH)
_ROUND = tl.constexpr(1.5 * 2**23)  # added and taken away, rounds a float32 to even


@triton.jit
def _normalize(value, mean, scale_inverse, mean_step, HAS_MEANS: tl.constexpr):
    """`search._normalize` for one group: weights in units of the scale, and the mean's code."""
    if HAS_MEANS:
        code = (mean * scale_inverse / mean_step + _ROUND) - _ROUND
        code = tl.minimum(tl.maximum(code, -_MEAN_LIMIT), _MEAN_LIMIT)
        return value * scale_inverse - code * mean_step, code
    else:
        return value * scale_inverse, mean * 0


@triton.jit
def _cell(normalized, offset):
    cell = (normalized + _REACH) * _PER_UNIT
    return tl.minimum(tl.maximum(cell, 0.0), _CELLS - 1.0).to(tl.int32) + offset


@triton.jit
def _error(
    index, value, share, mean, unit, offset, nearest, scales, inverse, mean_step,
    HAS_MEANS: tl.constexpr,
):  # fmt: skip
    """The error of a group with the scale at `index`, in units of the scale it began with."""
    normalized, _ = _normalize(value, mean, tl.load(inverse + index), mean_step, HAS_MEANS)
    distance = tl.load(nearest + _cell(normalized, offset)) - normalized
    size = tl.load(scales + index) * unit
    return tl.sum(distance * distance * share, axis=0) * (size * size)


@triton.jit
def block_kernel(
    weights, shares, sizes, depths, order, factor,
    nearest, code_of_cell, levels, borders, scales, inverse, middle,
    codes, scale_codes, mean_codes, errors, sums,
    low, count, columns, clusters, group, ladder, mean_step,
    SEARCH: tl.constexpr, HAS_MEANS: tl.constexpr,
    COUNT: tl.constexpr, GROUP: tl.constexpr, LADDER: tl.constexpr,
):  # fmt: skip
    """One cluster's groups in the columns low … low + count of the feedback's order."""
    cluster = tl.program_id(0)
    lane = tl.arange(0, GROUP)
    inside = lane < group
    filled = lane < tl.load(sizes + cluster)
    row = cluster * group + lane
    width = (clusters * group).to(tl.int64)
    share = tl.load(shares + row, mask=inside, other=0)
    turn = tl.arange(0, COUNT)
    rung = tl.arange(0, LADDER)
    # Between the scales 1, 2, …: a group of any size belongs to the one nearest to it.
    border = tl.load(middle + rung, mask=rung < ladder - 2, other=float("inf"))
    pushed = tl.zeros((COUNT, GROUP), tl.float32)
    for j in range(0, count):
        column = (low + j).to(tl.int64)
        place = tl.load(order + column)
        depth = tl.load(depths + place * clusters + cluster).to(tl.int32)
        offset = depth * _CELLS
        felt = tl.load(
            factor + (low + turn) * columns.to(tl.int64) + column, mask=turn < j, other=0
        )
        value = tl.load(weights + column * width + row, mask=inside, other=0)
        value -= tl.sum(felt[:, None] * pushed, axis=0)

        mean = tl.sum(value * share, axis=0)
        spread = tl.sum(value * value * share, axis=0)
        if HAS_MEANS:
            reach = mean / _MEAN_REACH
            spread = tl.maximum(tl.maximum(spread - mean * mean, 0.0), reach * reach)
        octaves = tl.log2(tl.maximum(spread, 1e-38)) / 2
        start = tl.where(spread > 0, 1 + tl.sum((border < octaves).to(tl.int32), axis=0), 0)
        unit = tl.load(inverse + start)
        best = start
        if len(SEARCH) > 0:
            least = _error(
                best, value, share, mean, unit, offset, nearest, scales, inverse, mean_step,
                HAS_MEANS,
            )  # fmt: skip
            for sweep in tl.static_range(len(SEARCH)):
                centre = best
                for step in tl.static_range(len(SEARCH[sweep])):
                    index = centre + SEARCH[sweep][step]
                    index = tl.minimum(tl.maximum(index, 1), ladder - 1)
                    index = tl.where(start > 0, index, start)
                    found = _error(
                        index, value, share, mean, unit, offset, nearest, scales, inverse,
                        mean_step, HAS_MEANS,
                    )  # fmt: skip
                    best = tl.where(found < least, index, best)
                    least = tl.minimum(found, least)
            zero = tl.sum(value * unit * (value * unit) * share, axis=0)
            best = tl.where((best == 1) & (zero < least), 0, best)

        normalized, mean_code = _normalize(
            value, mean, tl.load(inverse + best), mean_step, HAS_MEANS
        )
        code = tl.load(code_of_cell + _cell(normalized, offset))
        lower = borders + code + depth * 257
        code = code - (normalized <= tl.load(lower)) + (normalized > tl.load(lower + 1))
        scale = tl.load(scales + best)
        shift = scale * (mean_code * mean_step)
        quantized = scale * tl.load(levels + code + depth * 256)
        centred = value - shift

        error = (centred - quantized) / tl.load(factor + column * columns + column)
        pushed = tl.where(turn[:, None] == j, error[None, :], pushed)
        tl.store(errors + j * width + row, error, mask=inside)
        tl.store(codes + place * width + row, code.to(tl.uint8), mask=inside)
        group_place = place * clusters + cluster
        tl.store(scale_codes + group_place, best.to(tl.uint8))
        tl.store(mean_codes + group_place, mean_code.to(tl.int8))
        kept, made = tl.where(filled, centred, 0), tl.where(filled, quantized, 0)
        plane = columns.to(tl.int64) * clusters
        tl.store(sums + group_place, tl.sum((kept - made) * (kept - made), axis=0).to(tl.float64))
        tl.store(sums + plane + group_place, tl.sum(kept * kept, axis=0).to(tl.float64))
        tl.store(sums + 2 * plane + group_place, tl.sum(kept * made, axis=0).to(tl.float64))


def warps(group: int) -> int:
    """As few as hold a block's errors in registers: the fewer, the less waiting for each other."""
    return 1 if group <= 64 else 4


def quantize_block(
    weights: torch.Tensor,
    shares: torch.Tensor,
    sizes: torch.Tensor,
    depths: torch.Tensor,
    order: torch.Tensor,
    factor: torch.Tensor,
    low: int,
    high: int,
    tables: search.Tables,
    grid: search.Grid,
    refine: bool,
    chosen: search.Chosen,
) -> torch.Tensor:
    """Choose for the columns low … high of the order; returns their errors (high − low, C·G).

    weights: (K, C·G) float32 in the order, moved by all columns before `low`. shares: (C, G), 1 in
    all for each cluster. sizes: (C,) int32 rows of the clusters. depths: (K, C) int64 in the order
    of the source. order, factor: as in `InverseFactor`. At most FUSED_BLOCK columns.
    """
    C, G = shares.shape
    errors = torch.empty((high - low, C * G), device=weights.device)
    block_kernel[(C,)](
        weights, shares, sizes, depths, order, factor,
        tables.nearest, tables.code, tables.levels, tables.borders,
        grid.scales, grid.inverse, grid.middle,
        chosen.codes, chosen.scale_codes, chosen.mean_codes, errors, chosen.sums,
        low, high - low, len(weights), C, G, len(grid.scales), float(grid.mean_step),
        SEARCH=search.SEARCH if refine else (), HAS_MEANS=bool(grid.mean_step > 0),
        COUNT=FUSED_BLOCK, GROUP=triton.next_power_of_2(G),
        LADDER=triton.next_power_of_2(len(grid.scales)),
        num_warps=warps(G),
    )  # fmt: skip
    return errors

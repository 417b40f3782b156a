"""y = x · Wᵀ for few rows of x: each packed word is read once and meets activations in integers.

A program is one warp.  It owns a tile of ROWS stored rows and a share of the chunks of its cluster
(split-K, see `shares`), and goes through three stages:

1. Prologue.  The inputs of its chunks, scaled and rounded to integers (`activations`), go to a
   scratch that only this program reads back, after a barrier: written by lanes in parallel, read at
   one address for all lanes, eight activations per load.
2. One loop per depth.  Lanes are rows.  `permute` looks four levels up, `dot4` multiplies them with
   four activations; one conversion and one multiply-add per chunk and row.  Depths 5–8 look
   float32 levels up in memory (the table, 1 KiB, stays in L1) and multiply unrounded activations.
   The words of a share follow each other, whatever their depths: the first LOOK_AHEAD are asked for
   before anything else, and in every turn those that lie as far ahead, so that a turn finds its own
   in the L2 cache and no wait of one program shows.
3. Epilogue.  Partial sums go to a buffer; the last program of a tile to arrive adds them in order
   of the parts, so that results do not depend on who was last.  Bias and the permutation of rows
   cost nothing there; what the means add is summed up in the prologue.

Error: rounding 32 inputs to int8 adds at most 32 · (largest/127)² / 12 to the error power, 1.7 % of
what quantizing the weights of the largest alone costs at 4 bits, and less at fewer bits.  If WIDE,
activations and levels have two bytes each: 2^−16 of that power, integer sums still exact, and for
depths 1–3 levels nearer than in float16.  Products of input and scale below 1e-36 count as zero.

Road not taken: activations in registers or shared memory by `tl` alone.  Triton then converts
layouts through shared memory with a barrier per word, 1.6 instead of 1.2 instructions per weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

import cvxq_kernels.gpu.names as names
from cvxq_kernels.gpu.activations import scale_inputs
from cvxq_kernels.gpu.codes import load_nibbles, load_quads
from cvxq_kernels.gpu.item import chunks_of_depth, hidden_zeros, read_item
from cvxq_kernels.gpu.overlap import wait_for_the_kernel_before
from cvxq_kernels.gpu.plan import NOT_SPECIALIZED
from cvxq_kernels.gpu.snippets import dot4, permute, prefetch, prefetch_ahead


@triton.jit
def _look_up(nibbles, selector, table, DEPTH: tl.constexpr, WIDE: tl.constexpr, PTX: tl.constexpr):
    """Levels of four codes as two or three words of signed bytes; see `tables` for their sum."""
    if WIDE:
        upper = permute(table[0], table[1], selector, PTX)
        lower = permute(table[2], table[3], selector, PTX)
        if DEPTH == 4:
            return upper, lower, permute(table[4], table[5], nibbles, PTX)
        return upper, lower, lower
    upper = permute(table[0], table[1], selector, PTX)
    if DEPTH == 4:
        return upper, permute(table[2], table[3], nibbles, PTX), upper
    return upper, upper, upper


@triton.jit
def _dot_bytes(levels, acts, dot, DEPTH: tl.constexpr, PTX: tl.constexpr):
    """Add four levels times four activations, signed bytes, to `dot`."""
    dot = dot4(levels[0], acts, dot, PTX)
    if DEPTH == 4:
        dot = dot4(levels[1], acts, dot, PTX)
    return dot


@triton.jit
def _dot_wide(levels, upper, lower, dots, DEPTH: tl.constexpr, PTX: tl.constexpr):
    """Add the products of 16-bit levels and activations to `dots`, by what they count.

    Both lower bytes' product is left out: 2^−16 of the largest.
    """
    first = dot4(levels[0], upper, dots[0], PTX)
    second = dot4(levels[1], upper, dot4(levels[0], lower, dots[1], PTX), PTX)
    if DEPTH == 4:
        third = dot4(levels[2], upper, dots[2], PTX)
        return first, second, third, dot4(levels[2], lower, dots[3], PTX)
    return first, second, dots[2], dots[3]


@triton.jit
def _low_run(
    totals, words, acts8, steps, slots, tables, zero, unit, first, last,
    DEPTH: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    WIDE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add the chunks [first, last) of a depth of 1–4 to M sums of (ROWS,)."""
    row = tl.arange(0, ROWS)
    table = ()
    for i in tl.static_range(6 if WIDE else 4):
        table += (tl.load(tables + i) + zero,)
    if WIDE:
        gap_unit = tl.load(tables + 6).to(tl.float32, bitcast=True)
    for chunk in tl.range(first, last, loop_unroll_factor=UNROLL):
        prefetch_ahead(words + chunk * (DEPTH * ROWS), DEPTH * ROWS, PTX)
        eighths = load_nibbles(words + chunk * (DEPTH * ROWS) + row, ROWS, DEPTH)
        levels = ()
        for i in tl.static_range(4):
            nibbles = eighths[i]
            selector = nibbles & 0x77777777 if DEPTH == 4 else nibbles
            levels += (_look_up(nibbles, selector, table, DEPTH, WIDE, PTX),)
            levels += (_look_up(nibbles >> 16, selector >> 16, table, DEPTH, WIDE, PTX),)
        sums = ()
        for m in tl.static_range(M):
            slot = m * slots + chunk
            dot = tl.zeros([ROWS], tl.int32)
            dots = (dot, dot, dot, dot)
            for i in tl.static_range(4):
                upper = tl.load(acts8 + slot * names.EIGHTHS + i)
                if WIDE:
                    lower = tl.load(acts8 + (M * slots + slot) * names.EIGHTHS + i)
                    dots = _dot_wide(
                        levels[2 * i], upper.to(tl.int32), lower.to(tl.int32), dots, DEPTH, PTX
                    )
                    dots = _dot_wide(
                        levels[2 * i + 1], (upper >> 32).to(tl.int32), (lower >> 32).to(tl.int32),
                        dots, DEPTH, PTX,
                    )  # fmt: skip
                else:
                    dot = _dot_bytes(levels[2 * i], upper.to(tl.int32), dot, DEPTH, PTX)
                    dot = _dot_bytes(levels[2 * i + 1], (upper >> 32).to(tl.int32), dot, DEPTH, PTX)
            if WIDE:
                dot = dots[0] * 256 + dots[1]
            found = dot.to(tl.float32)
            if WIDE and DEPTH == 4:
                gaps = (dots[2] * 256 + dots[3]).to(tl.float32)
                found = tl.fma(gaps, gap_unit, found)
            step = tl.load(steps + slot) * unit
            sums += (tl.fma(found, step, totals[m]),)
        totals = sums
    return totals


@triton.jit
def _high_run(
    totals, words, acts32, slots, levels, first, last,
    DEPTH: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add the chunks [first, last) of a depth of 5–8; levels: its 2^DEPTH float32.

    Half a chunk in a turn: compiling takes a time that grows with the cube of the loop's body.
    """
    row = tl.arange(0, ROWS)
    for half in range(2 * first, 2 * last):
        prefetch_ahead(words + half * (DEPTH * ROWS // 2), DEPTH * ROWS // 2, PTX)
        pointers = words + (half >> 1) * (DEPTH * ROWS) + row
        quads = load_quads(pointers, ROWS, half & 1, DEPTH)
        for quad in tl.static_range(4):
            for pair in tl.static_range(2):
                left = tl.load(levels + ((quads[quad] >> (16 * pair)) & 255))
                right = tl.load(levels + ((quads[quad] >> (16 * pair + 8)) & 255))
                sums = ()
                for m in tl.static_range(M):
                    acts = tl.load(acts32 + m * slots * names.PAIRS + half * 8 + (2 * quad + pair))
                    first_act = acts.to(tl.int32).to(tl.float32, bitcast=True)
                    second_act = (acts >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                    sums += (tl.fma(right, second_act, tl.fma(left, first_act, totals[m])),)
                totals = sums
    return totals


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def matvec_kernel(
    items, words, chunks, order, scale_words, mean_words, scales, mean_steps, level_words, exact,
    units, row_of, factors, x, x_stride, batch, bias, out, out_stride,
    acts8, acts32, steps, slots, partial, arrived,
    M: tl.constexpr, ROWS: tl.constexpr, DEPTHS: tl.constexpr, SPLIT: tl.constexpr,
    HAS_MEANS: tl.constexpr, HAS_BIAS: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr,
    PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[m, row_of[i]] for m < batch ≤ M; grid: `items`. See `DeviceMatrix` for the rest.

    scale_words, mean_words: eight codes per int64. acts8, acts32, steps: scratch as in
    `scale_inputs`. partial: (items, M, ROWS) float32; arrived: T int32, zero before and after.
    level_words: `byte_words` of `tables`, or `wide_words` if WIDE. DEPTHS has bit B set for every
    depth B that may occur.
    """
    tile, _, part, parts, sums, chunk, slot, word, columns, matrix = read_item(items)
    words += word.to(tl.int64) * ROWS
    prefetch_ahead(words - names.LOOK_AHEAD, names.LOOK_AHEAD, PTX)
    row = tl.arange(0, ROWS)
    place = tile * ROWS + row
    target = tl.load(row_of + place)
    factor = tl.load(factors + place)
    if HAS_BIAS:
        shift = tl.load(bias + target, mask=target >= 0, other=0).to(tl.float32)
    low, high = chunks_of_depth(items, 0), 0
    for depth in tl.static_range(1, names.MAX_DEPTH + 1):
        if depth <= names.LOW_DEPTH:
            low += chunks_of_depth(items, depth)
        else:
            high += chunks_of_depth(items, depth)
    acts8 += slot * names.EIGHTHS
    acts32 += slot * names.PAIRS
    steps += slot
    HIGH: tl.constexpr = DEPTHS > names.LOW_DEPTHS
    side = chunk * names.EIGHTHS
    lane, last = tl.arange(0, 32), tl.maximum(low + high - 1, 0)
    prefetch(chunks + chunk + tl.minimum(32 * lane, last), PTX)
    prefetch(scale_words + side + tl.minimum(16 * lane, last * names.EIGHTHS), PTX)
    wait_for_the_kernel_before(OVERLAP)
    totals = scale_inputs(
        x, x_stride, order + columns, scale_words + side, mean_words + side,
        scales + matrix * names.SCALES, mean_steps + matrix, chunks + chunk,
        acts8, acts32, steps, slots, low + high, low, batch, M, WIDE, HIGH, HAS_MEANS, ROWS, PTX,
    )  # fmt: skip
    tl.debug_barrier()  # the scratch is read by other lanes than wrote it
    zero = hidden_zeros(target)
    WORDS: tl.constexpr = names.WIDE_WORDS if WIDE else names.BYTE_WORDS
    UNITS: tl.constexpr = names.WIDE_UNITS if WIDE else names.BYTE_UNITS
    first = chunks_of_depth(items, 0)
    for depth in tl.static_range(1, names.MAX_DEPTH + 1):
        count = chunks_of_depth(items, depth)
        last = first + count
        if (DEPTHS >> depth) & 1:
            run = words - first * (depth * ROWS)
            if depth <= names.LOW_DEPTH:
                totals = _low_run(
                    totals, run, acts8, steps, slots, level_words + WORDS * depth, zero,
                    tl.load(units + UNITS + depth), first, last,
                    depth, M, ROWS, UNROLL, WIDE, PTX,
                )  # fmt: skip
            else:
                totals = _high_run(
                    totals, run, acts32, slots, exact + (1 << depth), first, last,
                    depth, M, ROWS, PTX,
                )  # fmt: skip
        words += count * (depth * ROWS)
        first = last
    if SPLIT:
        for m in tl.static_range(M):
            tl.store(partial + ((sums + part) * M + m) * ROWS + row, totals[m])
        tl.debug_barrier()  # all lanes' sums are written before the one atomic that says so
        if tl.atomic_add(arrived + tile, 1) != parts - 1:
            return
        tl.store(arrived + tile, 0)
    for m in tl.static_range(M):
        result = totals[m]
        if SPLIT:
            own = partial + (sums * M + m) * ROWS + row
            result = tl.load(own, cache_modifier=".cg")
            for other in tl.range(1, parts, loop_unroll_factor=8):
                result += tl.load(own + other * (M * ROWS), cache_modifier=".cg")
        result *= factor
        if HAS_BIAS:
            result += shift
        keep = (target >= 0) & (m < batch)
        tl.store(out + m * out_stride + target, result, mask=keep)

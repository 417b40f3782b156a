"""y = x · Wᵀ for few rows of x: each packed word is read once and meets activations in integers.

A program is one warp.  It owns a tile of ROWS stored rows and a share of the chunks of its cluster
(split-K), and goes through three stages:

1. Prologue.  For every chunk: gather the 32 inputs, multiply by the group scales (with one scale
   per cluster and column, the scale acts on the input), round to int8 with one step per chunk.  The
   result goes to a scratch that only this program reads back, after a barrier: written by lanes in
   parallel, read at one address for all lanes, eight activations per load.
2. One loop per depth.  Lanes are rows.  `permute` looks four levels up, `dot4` multiplies them with
   four activations; one conversion and one multiply-add per chunk and row.  Depths 5–8 look
   float32 levels up in memory (the table, 1 KiB, stays in L1) and multiply unrounded activations.
3. Epilogue.  Partial sums go to a buffer; the last program of a tile to arrive adds them in order
   of the splits, so that results do not depend on who was last.  Bias, means and the permutation of
   rows cost nothing there.

Error: rounding 32 inputs to int8 adds at most 32 · (largest/127)² / 12 to the error power, 1.7 % of
what quantizing the weights of the largest alone costs at 4 bits, and less at fewer bits.  Products
of input and scale below 1e-36 count as zero.

Road not taken: activations in registers or shared memory by `tl` alone.  Triton then converts
layouts through shared memory with a barrier per word, 1.6 instead of 1.2 instructions per weight.
Nor tensors of (chunks, 32) in the prologue: their loads want different layouts, between which
Triton 3.6 converts through shared memory (0.53 per weight).  Tensors of 32 lanes have only one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvxq_kernels.gpu.codes import load_nibbles, load_quad
from cvxq_kernels.gpu.plan import NOT_SPECIALIZED
from cvxq_kernels.gpu.snippets import dot4, permute

_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it leaves the nearest integer in the low bits
WIDTH = 8  # chunks that a program of `means_kernel` works on at a time


@triton.jit
def _pack4(a, b, c, d, PTX: tl.constexpr):
    """The lowest bytes of four int32 as the bytes of one."""
    return permute(permute(a, b, 0x40, PTX), permute(c, d, 0x40, PTX), 0x5410, PTX)


@triton.jit
def _pair(low, high):
    """Two 32-bit values as an int64."""
    low = low.to(tl.uint32, bitcast=True).to(tl.int64)
    return (high.to(tl.uint32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def _prologue(
    x, x_stride, order, scale_words, scales, chunks, acts8, acts32, steps, slots,
    first, last, first_high, batch, M: tl.constexpr, HIGH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Scale the inputs of chunks [first, last) into the scratch: int8, and float32 if HIGH.

    Eight chunks in a turn; lane l has columns 8(l % 4) … 8(l % 4) + 7 of chunk l // 4.
    """
    lane = tl.arange(0, 32)
    shift = tl.full([32], _ROUND, tl.float32)
    for start in range(first, last, 8):
        # Lanes beyond the end repeat the last chunk, and write what is written there anyway.
        chunk = tl.minimum(start + (lane >> 2), last - 1)
        entry = tl.load(chunks + chunk)
        part = lane & 3
        width = (entry & 63) - 8 * part
        place = chunk * 4 + part
        both = tl.load(scale_words + place)
        columns, factors = (), ()
        for i in tl.static_range(8):
            columns += (tl.load(order + (entry >> 10) + 8 * part + i),)
            code = ((both >> (8 * i)) & 255).to(tl.int32)
            factors += (tl.load(scales + code, mask=i < width, other=0),)
        for m in tl.static_range(M):
            row = x + tl.minimum(m, batch - 1) * x_stride
            values = ()
            largest = tl.zeros([32], tl.float32)
            for i in tl.static_range(8):
                value = tl.load(row + columns[i]).to(tl.float32) * factors[i]
                values += (value,)
                largest = tl.maximum(largest, tl.abs(value))
            largest = tl.max(tl.reshape(largest, (8, 4)), axis=1)
            largest = tl.broadcast_to(largest[:, None], (8, 4)).reshape(32)
            factor = tl.where(largest > 1e-36, 127.0 / tl.maximum(largest, 1e-36), 0.0)
            whole = ()
            for i in tl.static_range(8):
                whole += (tl.fma(values[i], factor, shift).to(tl.int32, bitcast=True),)
            left = _pack4(whole[0], whole[1], whole[2], whole[3], PTX)
            right = _pack4(whole[4], whole[5], whole[6], whole[7], PTX)
            tl.store(acts8 + m * slots * 4 + place, _pair(left, right))
            tl.store(steps + m * slots + chunk, largest * (1.0 / 127.0))
            if HIGH:
                target = acts32 + m * slots * 16 + 4 * place
                for i in tl.static_range(4):
                    pair = _pair(
                        values[2 * i].to(tl.int32, bitcast=True),
                        values[2 * i + 1].to(tl.int32, bitcast=True),
                    )
                    tl.store(target + i, pair, mask=chunk >= first_high)


@triton.jit
def _levels(nibbles, t0, t1, t2, t3, DEPTH: tl.constexpr, PTX: tl.constexpr):
    """Levels of eight codes as signed bytes, columns 0–3 and 4–7, and what depth 4 adds to each."""
    if DEPTH <= 2:
        left = permute(t0, t0, nibbles, PTX)
        right = permute(t0, t0, nibbles >> 16, PTX)
    elif DEPTH == 3:
        left = permute(t0, t1, nibbles, PTX)
        right = permute(t0, t1, nibbles >> 16, PTX)
    else:
        selector = nibbles & 0x77777777
        left = permute(t0, t1, selector, PTX)
        right = permute(t0, t1, selector >> 16, PTX)
        return left, right, permute(t2, t3, nibbles, PTX), permute(t2, t3, nibbles >> 16, PTX)
    return left, right, left, right


@triton.jit
def _add(levels, acts, dot, DEPTH: tl.constexpr, PTX: tl.constexpr):
    """Add eight levels times eight activations, the bytes of int64 `acts`, to `dot`."""
    left = acts.to(tl.int32)
    right = (acts >> 32).to(tl.int32)
    dot = dot4(levels[0], left, dot, PTX)
    dot = dot4(levels[1], right, dot, PTX)
    if DEPTH == 4:
        dot = dot4(levels[2], left, dot, PTX)
        dot = dot4(levels[3], right, dot, PTX)
    return dot


@triton.jit
def _low_run(
    totals, words, acts8, steps, slots, table, unit, first, last,
    DEPTH: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Add the chunks [first, last) of a depth of 1–4 to M sums of (ROWS,)."""
    row = tl.arange(0, ROWS)
    t0 = tl.load(table)
    t1 = tl.load(table + 1)
    t2 = tl.load(table + 2)
    t3 = tl.load(table + 3)
    for chunk in tl.range(first, last, loop_unroll_factor=UNROLL):
        n0, n1, n2, n3 = load_nibbles(words + chunk * (DEPTH * ROWS) + row, ROWS, DEPTH)
        l0 = _levels(n0, t0, t1, t2, t3, DEPTH, PTX)
        l1 = _levels(n1, t0, t1, t2, t3, DEPTH, PTX)
        l2 = _levels(n2, t0, t1, t2, t3, DEPTH, PTX)
        l3 = _levels(n3, t0, t1, t2, t3, DEPTH, PTX)
        sums = ()
        for m in tl.static_range(M):
            slot = m * slots + chunk
            dot = tl.zeros([ROWS], tl.int32)
            dot = _add(l0, tl.load(acts8 + slot * 4), dot, DEPTH, PTX)
            dot = _add(l1, tl.load(acts8 + slot * 4 + 1), dot, DEPTH, PTX)
            dot = _add(l2, tl.load(acts8 + slot * 4 + 2), dot, DEPTH, PTX)
            dot = _add(l3, tl.load(acts8 + slot * 4 + 3), dot, DEPTH, PTX)
            step = tl.load(steps + slot) * unit
            sums += (tl.fma(dot.to(tl.float32), step, totals[m]),)
        totals = sums
    return totals


@triton.jit
def _high_run(
    totals, words, acts32, slots, levels, first, last,
    DEPTH: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the chunks [first, last) of a depth of 5–8; levels: its 2^DEPTH float32."""
    row = tl.arange(0, ROWS)
    for chunk in range(first, last):
        pointers = words + chunk * (DEPTH * ROWS) + row
        for quad in tl.static_range(8):
            codes = load_quad(pointers, ROWS, quad, DEPTH)
            for pair in tl.static_range(2):
                left = tl.load(levels + ((codes >> (16 * pair)) & 255))
                right = tl.load(levels + ((codes >> (16 * pair + 8)) & 255))
                sums = ()
                for m in tl.static_range(M):
                    acts = tl.load(acts32 + (m * slots + chunk) * 16 + 2 * quad + pair)
                    first_act = acts.to(tl.int32).to(tl.float32, bitcast=True)
                    second_act = (acts >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                    sums += (tl.fma(right, second_act, tl.fma(left, first_act, totals[m])),)
                totals = sums
    return totals


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def matvec_kernel(
    words, tiles, runs, chunks, order, scale_words, scales, byte_words, exact, units, row_of,
    x, x_stride, batch, means, clusters, bias, out, out_stride,
    acts8, acts32, steps, slots, partial, arrived, splits,
    M: tl.constexpr, ROWS: tl.constexpr, DEPTHS: tl.constexpr, SPLIT: tl.constexpr,
    HAS_MEANS: tl.constexpr, HAS_BIAS: tl.constexpr, UNROLL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out[m, row_of[i]] for m < batch ≤ M; grid (tiles, splits). See `DeviceMatrix` for the rest.

    acts8, acts32 int64 and steps float32: scratch of M · slots chunks. partial: splits · M · T ·
    ROWS float32; arrived: T int32, zero before and after. means: (M, clusters) float32 or unused.
    DEPTHS has bit B set for every depth B that may occur.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    info = tiles + tile * 8
    cluster = tl.load(info)
    base = tl.load(info + 1).to(tl.int64) * ROWS
    chunk_base = tl.load(info + 2)
    slot_base = tl.load(info + 3)
    ends = runs + cluster * 10
    begin = tl.load(ends + 1)
    count = tl.load(ends + 9) - begin
    first = begin + count * split // splits
    last = begin + count * (split + 1) // splits
    HIGH: tl.constexpr = DEPTHS >= 32
    _prologue(
        x, x_stride, order + tl.load(info + 4), scale_words + chunk_base * 4,
        scales + tl.load(info + 5) * 256, chunks + chunk_base,
        acts8 + slot_base * 4, acts32 + slot_base * 16, steps + slot_base, slots,
        first, last, tl.load(ends + 5), batch, M, HIGH, PTX,
    )  # fmt: skip
    tl.debug_barrier()  # the scratch is read by other lanes than wrote it
    row = tl.arange(0, ROWS)
    target = tl.load(row_of + tile * ROWS + row)
    # Zeros, which ptxas cannot see: tables that it proves equal for all lanes go to uniform
    # registers, from which it moves them back for every look-up (0.2 instructions per weight).
    zero = tl.minimum(target, -1) + 1
    totals = ()
    for _ in tl.static_range(M):
        totals += (tl.zeros([ROWS], tl.float32),)
    for depth in tl.static_range(1, 9):
        low = tl.load(ends + depth)
        high = tl.load(ends + depth + 1)
        if (DEPTHS >> depth) & 1:
            run = words + base - low * (depth * ROWS)
            here = tl.maximum(first, low)
            there = tl.minimum(last, high)
            if depth <= 4:
                totals = _low_run(
                    totals, run, acts8 + slot_base * 4, steps + slot_base, slots,
                    byte_words + 4 * depth + zero, tl.load(units + depth), here, there,
                    depth, M, ROWS, UNROLL, PTX,
                )  # fmt: skip
            else:
                totals = _high_run(
                    totals, run, acts32 + slot_base * 16, slots, exact + (1 << depth), here, there,
                    depth, M, ROWS,
                )  # fmt: skip
        base += (high - low).to(tl.int64) * (depth * ROWS)
    padded = tl.num_programs(0) * ROWS
    place = tile * ROWS + row
    if SPLIT:
        for m in tl.static_range(M):
            tl.store(partial + (split * M + m) * padded + place, totals[m])
        tl.debug_barrier()  # all lanes' sums are written before the one atomic that says so
        if tl.atomic_add(arrived + tile, 1) != splits - 1:
            return
        tl.store(arrived + tile, 0)
    for m in tl.static_range(M):
        result = totals[m]
        if SPLIT:
            result = tl.load(partial + m * padded + place, cache_modifier=".cg")
            for other in range(1, splits):
                part = partial + (other * M + m) * padded + place
                result += tl.load(part, cache_modifier=".cg")
        if HAS_MEANS:
            result += tl.load(means + m * clusters + cluster)
        if HAS_BIAS:
            result += tl.load(bias + target, mask=target >= 0, other=0).to(tl.float32)
        keep = (target >= 0) & (m < batch)
        tl.store(out + m * out_stride + target, result, mask=keep)


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

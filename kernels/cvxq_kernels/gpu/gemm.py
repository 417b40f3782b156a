"""y = x · Wᵀ for some dozens of rows of x: tiles decoded into float16 operands of tensor cores.

A program owns a tile of ROWS stored rows, MT rows of x and a share of the cluster's chunks
(split-K).  A chunk is decoded into a (ROWS, 32) float16 operand; the other operand
is the input of its columns times the group scales; products accumulate in float32.  This is also
the exact path for few rows of x: nothing is rounded to less than float16.

Nothing waits inside a turn: what the next chunk needs is asked for before this one is decoded, and
its words are in the L2 cache by then, as in `matvec`.  For that the input is sorted once, before:
`sort_kernel` puts its columns in the order of the chunks, so that where a chunk's inputs lie
follows from its number.  Clusters with orders of their own would make too many copies; there the
order is looked up in every turn (SORTED false).

Ranges.  The input is divided by the largest magnitude of each of its rows (`sort_kernel`), the
scales by the cluster's largest, the levels by the depth's unit; all operands are within ±1 and the
factors return in float32 at the end.  What float16 then loses is below 2^−24 of the largest
operand, far under the error of 8-bit codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

import cvxq_kernels.gpu.names as names
from cvxq_kernels.gpu.codes import chunk_codes, in_order, load_words, nibbles_of
from cvxq_kernels.gpu.item import chunks_of_depth, hidden_zeros, read_item
from cvxq_kernels.gpu.plan import NOT_SPECIALIZED
from cvxq_kernels.gpu.snippets import permute, prefetch, prefetch_ahead


@triton.jit
def sort_kernel(
    x, x_stride, batch, columns, order, length, padded_batch, out, largest,
    SORTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[m, i] = x[m, order[i]] / largest[m], or x[m, i] unless SORTED; 0 for m ≥ batch.

    Grid (padded batch, ⌈length / BLOCK⌉).  x: (batch, columns); order: (length,) int32; out:
    (length, padded_batch) float16; largest: (padded batch,) float32, 1 where x is 0.
    Every program finds the row's largest magnitude itself: cheaper than waiting for another.
    """
    m = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        wanted = (start + lane < columns) & (m < batch)
        value = tl.load(x + m * x_stride + start + lane, mask=wanted, other=0).to(tl.float32)
        found = tl.maximum(found, tl.abs(value))
    top = tl.max(found, axis=0)
    top = tl.where(top > 1e-36, top, 1.0)
    place = tl.program_id(1) * BLOCK + lane
    column = place
    if SORTED:
        column = tl.load(order + place, mask=place < length, other=0)
    wanted = (column < columns) & (place < length) & (m < batch)
    value = tl.load(x + m * x_stride + column, mask=wanted, other=0).to(tl.float32) / top
    tl.store(out + place * padded_batch + m, value, mask=place < length)
    tl.store(largest + m, top)


@triton.jit
def _half_words(nibbles, table, DEPTH: tl.constexpr, PTX: tl.constexpr):
    """Float16 levels of eight codes as four int32 of two halves, columns in order.

    table: (8,) int32, the low bytes of the levels by nibble, then their high bytes.
    """
    low = _half_bytes(nibbles, table, DEPTH, PTX)
    high = _half_bytes(nibbles, table + 4, DEPTH, PTX)
    return (
        permute(low[0], high[0], 0x5140, PTX),
        permute(low[0], high[0], 0x7362, PTX),
        permute(low[1], high[1], 0x5140, PTX),
        permute(low[1], high[1], 0x7362, PTX),
    )


@triton.jit
def _half_bytes(nibbles, table, DEPTH: tl.constexpr, PTX: tl.constexpr):
    """One byte of each of eight levels: two words of four bytes."""
    t0 = tl.load(table)
    t1 = tl.load(table + 1)
    if DEPTH <= 3:
        return permute(t0, t1, nibbles, PTX), permute(t0, t1, nibbles >> 16, PTX)
    else:
        # Two tables of eight; the nibble's highest bit selects between them, byte by byte.
        t2 = tl.load(table + 2)
        t3 = tl.load(table + 3)
        selector = nibbles & 0x77777777
        choice = ((nibbles >> 1) & 0x44444444) | 0x32103210
        low = permute(permute(t0, t1, selector, PTX), permute(t2, t3, selector, PTX), choice, PTX)
        selector = selector >> 16
        first = permute(t0, t1, selector, PTX)
        second = permute(t2, t3, selector, PTX)
        return low, permute(first, second, choice >> 16, PTX)


@triton.jit
def _operand(
    words, pointers, halves, table, ROWS: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Levels of a chunk of a tile as (ROWS, 32) float16; its words, or at depths 5–8 where."""
    if DEPTH <= names.LOW_DEPTH:
        n0, n1, n2, n3 = nibbles_of(words, DEPTH)
        a0, a1, a2, a3 = _half_words(n0, table, DEPTH, PTX)
        b0, b1, b2, b3 = _half_words(n1, table, DEPTH, PTX)
        c0, c1, c2, c3 = _half_words(n2, table, DEPTH, PTX)
        d0, d1, d2, d3 = _half_words(n3, table, DEPTH, PTX)
        a = in_order(a0, a1, a2, a3)
        b = in_order(b0, b1, b2, b3)
        c = in_order(c0, c1, c2, c3)
        d = in_order(d0, d1, d2, d3)
        pairs = tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, 4, 4).permute(0, 2, 1)
        pairs = pairs.reshape(ROWS, 16)
        left = (pairs & 0xFFFF).to(tl.uint16)
        right = ((pairs >> 16) & 0xFFFF).to(tl.uint16)
        return tl.join(left, right).reshape(ROWS, 32).to(tl.float16, bitcast=True)
    else:
        return tl.load(halves + (1 << DEPTH) + chunk_codes(pointers, ROWS, DEPTH))


@triton.jit
def _fetch(
    x, padded_batch, order, first, chunks, scale_codes, words, number,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Ask for what a chunk needs: its inputs (32, MT), entry, scale codes (32,), words (ROWS,).

    first: place of the run's first column.
    """
    lane = tl.arange(0, names.CHUNK)
    column = first + names.CHUNK * number + lane
    if not SORTED:
        column = tl.load(order + column)
    pointers = words + number * (DEPTH * ROWS) + tl.arange(0, ROWS)
    found = ()
    if DEPTH <= names.LOW_DEPTH:
        found = load_words(pointers, ROWS, DEPTH)
    code = tl.load(scale_codes + number * names.CHUNK + lane)
    return tl.load(x + column[:, None] * padded_batch), tl.load(chunks + number), code, found


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def gemm_kernel(
    items, words, chunks, order, scale_codes, scales, half_words, halves, units, top, row_of,
    factors, x, largest, batch, padded_batch, means, clusters, tile_count, bias, out,
    out_stride, partial, arrived, MT: tl.constexpr, ROWS: tl.constexpr, DEPTHS: tl.constexpr,
    SPLIT: tl.constexpr, HAS_MEANS: tl.constexpr, HAS_BIAS: tl.constexpr, SORTED: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """out[m, row_of[i]] for m < batch; grid (items, padded_batch // MT).

    x: (length, padded_batch) float16 and largest: (padded_batch,) float32, from `sort_kernel`;
    partial: (items, padded_batch, ROWS) float32; arrived: padded_batch // MT · tile_count int32, 0
    before and after; means: (batch, clusters) float32; the rest as in `matvec`.
    """
    tile, cluster, part, parts, sums, chunk, _, word, columns, matrix = read_item(items)
    words += word.to(tl.int64) * ROWS
    prefetch(words + 32 * tl.arange(0, names.LOOK_AHEAD // 32), PTX)
    row = tl.arange(0, ROWS)
    target = tl.load(row_of + tile * ROWS + row)
    zero = hidden_zeros(target)
    scales += matrix * names.SCALES
    lane = tl.arange(0, names.CHUNK)
    m = tl.program_id(1) * MT + tl.arange(0, MT)
    rows_of_x = x + m[None, :]
    peak = tl.load(top + cluster)
    peak = tl.where(peak > 1e-36, peak, 1.0)
    largest_unit = tl.load(units + names.HALF_UNITS + names.MAX_DEPTH)
    total = tl.zeros([MT, ROWS], tl.float32)
    chunk += chunks_of_depth(items, 0)
    for depth in tl.static_range(1, names.MAX_DEPTH + 1):
        count = chunks_of_depth(items, depth)
        if (DEPTHS >> depth) & 1:  # noqa: SIM102 - which is decided when compiling
            if count > 0:
                unit = tl.load(units + names.HALF_UNITS + depth) / largest_unit / peak
                table = half_words + names.HALF_WORDS * depth + zero
                first = columns + (tl.load(chunks + chunk) >> names.START_SHIFT)
                side, entries = scale_codes + chunk * names.CHUNK, chunks + chunk
                coming = _fetch(
                    rows_of_x,
                    padded_batch,
                    order,
                    first,
                    entries,
                    side,
                    words,
                    0,
                    ROWS,
                    depth,
                    SORTED,
                )
                for number in range(count):
                    acts, entry, code, own = coming
                    following = tl.minimum(number + 1, count - 1)
                    coming = _fetch(
                        rows_of_x, padded_batch, order, first, entries, side, words, following,
                        ROWS, depth, SORTED,
                    )  # fmt: skip
                    pointers = words + number * (depth * ROWS)
                    prefetch_ahead(pointers, depth * ROWS, PTX)
                    inside = lane < (entry & names.WIDTH_MASK)
                    scale = tl.load(scales + code.to(tl.int32), mask=inside, other=0) * unit
                    acts *= scale.to(tl.float16)[:, None]
                    levels = _operand(own, pointers + row, halves, table, ROWS, depth, PTX)
                    total = tl.dot(tl.trans(acts), tl.trans(levels), total)
        words += count * (depth * ROWS)
        chunk += count
    magnitude = tl.load(largest + m)
    total *= (magnitude * (largest_unit * peak))[:, None]
    if SPLIT:
        own = partial + (sums * padded_batch + m)[:, None] * ROWS + row[None, :]
        tl.store(own + part * (padded_batch * ROWS), total)
        tl.debug_barrier()
        counter = arrived + tl.program_id(1) * tile_count + tile
        if tl.atomic_add(counter, 1) != parts - 1:
            return
        tl.store(counter, 0)
        total = tl.load(own, cache_modifier=".cg")
        for other in range(1, parts):
            total += tl.load(own + other * (padded_batch * ROWS), cache_modifier=".cg")
    if HAS_MEANS:
        total += tl.load(means + m * clusters + cluster, mask=m < batch, other=0)[:, None]
    total *= tl.load(factors + tile * ROWS + row)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + target, mask=target >= 0, other=0).to(tl.float32)[None, :]
    keep = (target >= 0)[None, :] & (m < batch)[:, None]
    tl.store(out + m[:, None] * out_stride + target[None, :], total, mask=keep)

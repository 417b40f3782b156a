"""What `matvec` does to its inputs: gather, scale, round to integers with one step per chunk.

With one scale per cluster and column, the scale acts on the input.  Activations are one signed byte
each, or two (256 · upper + lower) where 16 bits are wanted.

A turn takes TURN = 8 chunks: lane l has columns 8(l % 4) … 8(l % 4) + 7 of chunk l // 4.  All
tensors have one element per lane, and so one layout; of tensors of (chunks, 32) the loads want
different ones, between which Triton 3.6 converts through shared memory (0.53 instead of 0.31
instructions per weight).
"""

from __future__ import annotations

import triton
import triton.language as tl

import cvxq_kernels.gpu.names as names
from cvxq_kernels.gpu.snippets import permute

_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it leaves the nearest integer in the low bits
TURN = 8
_TURN = tl.constexpr(TURN)


@triton.jit
def _pair(low, high):
    """Two 32-bit values as an int64."""
    low = low.to(tl.uint32, bitcast=True).to(tl.int64)
    return (high.to(tl.uint32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def _pack8(whole, BYTE: tl.constexpr, PTX: tl.constexpr):
    """Byte BYTE of eight int32 as an int64."""
    PICK: tl.constexpr = 0x40 + 0x11 * BYTE
    left = permute(
        permute(whole[0], whole[1], PICK, PTX), permute(whole[2], whole[3], PICK, PTX), 0x5410, PTX
    )
    right = permute(
        permute(whole[4], whole[5], PICK, PTX), permute(whole[6], whole[7], PICK, PTX), 0x5410, PTX
    )
    return _pair(left, right)


@triton.jit
def scale_inputs(
    x, x_stride, order, scale_words, mean_words, scales, mean_step, chunks, acts8, acts32, steps,
    slots, count, first_high, batch, M: tl.constexpr, WIDE: tl.constexpr, HIGH: tl.constexpr,
    HAS_MEANS: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Scale the inputs of `count` chunks into the scratch; return M sums (ROWS,), all rows alike.

    acts8: eight signed bytes per int64, M rows of slots · EIGHTHS; steps: M rows of slots. If WIDE,
    M more rows have the lower bytes of 16-bit activations. acts32, if HIGH: two float32 per int64,
    M rows of slots · PAIRS, for chunks from first_high. scale_words, mean_words: eight codes per
    int64.  The sums are what the means of these chunks add to every output, Σ_k x[m, k] · S · t.
    """
    lane = tl.arange(0, 32)
    shift = tl.full([32], _ROUND, tl.float32)
    # Byte 1 of an integer plus 128 is what byte 0, signed, leaves to be counted in 256s.
    upper_shift = shift + 128.0
    LIMIT: tl.constexpr = 127.0 * 256 if WIDE else 127.0
    sums = ()
    for _ in tl.static_range(M):
        sums += (tl.zeros([32], tl.float32),)
    for start in range(0, count, _TURN):
        # Lanes beyond the end repeat the last chunk, and write what is written there anyway.
        chunk = tl.minimum(start + (lane >> 2), count - 1)
        entry = tl.load(chunks + chunk)
        part = lane & 3
        width = (entry & names.WIDTH_MASK) - 8 * part
        place = chunk * names.EIGHTHS + part
        both = tl.load(scale_words + place)
        if HAS_MEANS:
            means = tl.load(mean_words + place)
            is_own = start + (lane >> 2) < count
        columns, factors = (), ()
        for i in tl.static_range(8):
            columns += (tl.load(order + (entry >> names.START_SHIFT) + 8 * part + i),)
            code = ((both >> (8 * i)) & 255).to(tl.int32)
            factors += (tl.load(scales + code, mask=i < width, other=0),)
        added = ()
        for m in tl.static_range(M):
            row = x + tl.minimum(m, batch - 1) * x_stride
            values = ()
            largest = tl.zeros([32], tl.float32)
            of_means = tl.zeros([32], tl.float32)
            for i in tl.static_range(8):
                value = tl.load(row + columns[i]).to(tl.float32) * factors[i]
                values += (value,)
                largest = tl.maximum(largest, tl.abs(value))
                if HAS_MEANS:
                    code = (means << (56 - 8 * i)) >> 56  # signed
                    of_means = tl.fma(value, code.to(tl.int32).to(tl.float32), of_means)
            if HAS_MEANS:
                added += (sums[m] + tl.where(is_own, of_means, 0),)
            else:
                added += (sums[m],)
            largest = tl.max(tl.reshape(largest, (_TURN, 4)), axis=1)
            largest = tl.broadcast_to(largest[:, None], (_TURN, 4)).reshape(32)
            factor = tl.where(largest > 1e-36, LIMIT / tl.maximum(largest, 1e-36), 0.0)
            whole = ()
            for i in tl.static_range(8):
                whole += (tl.fma(values[i], factor, shift).to(tl.int32, bitcast=True),)
            target = acts8 + m * slots * names.EIGHTHS + place
            if WIDE:
                tl.store(target + M * slots * names.EIGHTHS, _pack8(whole, 0, PTX))
                whole = ()
                for i in tl.static_range(8):
                    whole += (tl.fma(values[i], factor, upper_shift).to(tl.int32, bitcast=True),)
                tl.store(target, _pack8(whole, 1, PTX))
            else:
                tl.store(target, _pack8(whole, 0, PTX))
            tl.store(steps + m * slots + chunk, largest * (1.0 / 127.0))
            if HIGH:
                pairs = acts32 + m * slots * names.PAIRS + 4 * place
                for i in tl.static_range(4):
                    pair = _pair(
                        values[2 * i].to(tl.int32, bitcast=True),
                        values[2 * i + 1].to(tl.int32, bitcast=True),
                    )
                    tl.store(pairs + i, pair, mask=chunk >= first_high)
        sums = added
    totals = ()
    for m in tl.static_range(M):
        total = tl.zeros([ROWS], tl.float32)
        if HAS_MEANS:
            total += tl.sum(sums[m], axis=0) * tl.load(mean_step)
        totals += (total,)
    return totals

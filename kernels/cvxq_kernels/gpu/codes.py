"""From device words to codes: eight per word in nibbles, or four in bytes (see `layout`)."""

from __future__ import annotations

import triton
import triton.language as tl

import cvxq_kernels.gpu.names as names


@triton.jit
def load_nibbles(pointers, STRIDE: tl.constexpr, DEPTH: tl.constexpr):
    """Load a chunk of depth 1–4 as `nibbles_of` takes it apart; a row's words lie STRIDE apart."""
    return nibbles_of(load_words(pointers, STRIDE, DEPTH), DEPTH)


@triton.jit
def load_words(pointers, STRIDE: tl.constexpr, DEPTH: tl.constexpr):
    """Load the DEPTH words of a chunk of depth 1–4 as four, the first in place of others."""
    first = tl.load(pointers)
    second, third, fourth = first, first, first
    if DEPTH >= 2:
        second = tl.load(pointers + STRIDE)
    if DEPTH >= 3:
        third = tl.load(pointers + 2 * STRIDE)
    if DEPTH >= 4:
        fourth = tl.load(pointers + 3 * STRIDE)
    return first, second, third, fourth


@triton.jit
def nibbles_of(words, DEPTH: tl.constexpr):
    """Take a chunk of depth 1–4 apart: four words, word v holding columns 8v … 8v + 7 as nibbles.

    Bits above the depth are zero.
    """
    first = words[0]
    if DEPTH == 1:
        return (
            first & 0x11111111,
            (first >> 1) & 0x11111111,
            (first >> 2) & 0x11111111,
            (first >> 3) & 0x11111111,
        )
    second = words[1]
    if DEPTH == 2:
        return (
            first & 0x33333333,
            (first >> 2) & 0x33333333,
            second & 0x33333333,
            (second >> 2) & 0x33333333,
        )
    third = words[2]
    if DEPTH == 3:
        fourth = (first >> 3) & 0x11111111
        fourth |= (second >> 2) & 0x22222222
        fourth |= (third >> 1) & 0x44444444
        return first & 0x77777777, second & 0x77777777, third & 0x77777777, fourth
    return first, second, third, words[3]


@triton.jit
def load_quads(pointers, STRIDE: tl.constexpr, half, DEPTH: tl.constexpr):
    """Load columns 16·half … 16·half + 15 of a chunk of depth 5–8 as four words of four bytes.

    half: 0 or 1, a constant or not.
    """
    if DEPTH == 8:
        first = pointers + half * (4 * STRIDE)
        return (
            tl.load(first),
            tl.load(first + STRIDE),
            tl.load(first + 2 * STRIDE),
            tl.load(first + 3 * STRIDE),
        )
    left = tl.load(pointers + half * (2 * STRIDE))
    right = tl.load(pointers + half * (2 * STRIDE) + STRIDE)
    q0 = left & 0x0F0F0F0F
    q1 = (left >> 4) & 0x0F0F0F0F
    q2 = right & 0x0F0F0F0F
    q3 = (right >> 4) & 0x0F0F0F0F
    if DEPTH >= 6:
        pairs = tl.load(pointers + (4 + half) * STRIDE)
        q0 |= (pairs << 4) & 0x30303030
        q1 |= (pairs << 2) & 0x30303030
        q2 |= pairs & 0x30303030
        q3 |= (pairs >> 2) & 0x30303030
    if DEPTH == 5:
        ones = tl.load(pointers + 4 * STRIDE) >> (4 * half)
        q0 |= (ones << 4) & 0x10101010
        q1 |= (ones << 3) & 0x10101010
        q2 |= (ones << 2) & 0x10101010
        q3 |= (ones << 1) & 0x10101010
    if DEPTH == 7:
        ones = tl.load(pointers + 6 * STRIDE) >> (4 * half)
        q0 |= (ones << 6) & 0x40404040
        q1 |= (ones << 5) & 0x40404040
        q2 |= (ones << 4) & 0x40404040
        q3 |= (ones << 3) & 0x40404040
    return q0, q1, q2, q3


@triton.jit
def in_order(a, b, c, d):
    """Join four (R,) tensors to (R, 4)."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 4)


@triton.jit
def chunk_codes(pointers, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Load a chunk of a tile: operand values (ROWS, 32) int32, columns in order.

    pointers: (ROWS,), the first word of every row.
    """
    if DEPTH <= names.LOW_DEPTH:
        n0, n1, n2, n3 = load_nibbles(pointers, ROWS, DEPTH)
        words = in_order(n0, n1, n2, n3)[:, :, None]
        codes = (words >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    else:
        a0, a1, a2, a3 = load_quads(pointers, ROWS, 0, DEPTH)
        b0, b1, b2, b3 = load_quads(pointers, ROWS, 1, DEPTH)
        left = in_order(a0, a1, a2, a3)
        right = in_order(b0, b1, b2, b3)
        words = tl.join(left, right).permute(0, 2, 1).reshape(ROWS, 8)[:, :, None]
        codes = (words >> (8 * tl.arange(0, 4))[None, None, :]) & 255
    return codes.reshape(ROWS, names.CHUNK)

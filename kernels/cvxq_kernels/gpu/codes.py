"""From device words to codes: eight per word in nibbles, or four in bytes (see `layout`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_nibbles(pointers, STRIDE: tl.constexpr, DEPTH: tl.constexpr):
    """Load a chunk of depth 1–4: four words, word v holding columns 8v … 8v + 7 as nibbles.

    Bits above the depth are zero.  The words of a row lie STRIDE apart.
    """
    first = tl.load(pointers)
    if DEPTH == 1:
        return (
            first & 0x11111111,
            (first >> 1) & 0x11111111,
            (first >> 2) & 0x11111111,
            (first >> 3) & 0x11111111,
        )
    second = tl.load(pointers + STRIDE)
    if DEPTH == 2:
        return (
            first & 0x33333333,
            (first >> 2) & 0x33333333,
            second & 0x33333333,
            (second >> 2) & 0x33333333,
        )
    third = tl.load(pointers + 2 * STRIDE)
    if DEPTH == 3:
        fourth = (first >> 3) & 0x11111111
        fourth |= (second >> 2) & 0x22222222
        fourth |= (third >> 1) & 0x44444444
        return first & 0x77777777, second & 0x77777777, third & 0x77777777, fourth
    fourth = tl.load(pointers + 3 * STRIDE)
    return first, second, third, fourth


@triton.jit
def _piece(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """`words` shifted right by SHIFT (left if negative), then masked."""
    if SHIFT >= 0:
        return (words >> SHIFT) & MASK
    else:
        return (words << -SHIFT) & MASK


@triton.jit
def load_quad(pointers, STRIDE: tl.constexpr, QUAD: tl.constexpr, DEPTH: tl.constexpr):
    """Load columns 4·QUAD … 4·QUAD + 3 of a chunk of depth 5–8 as the four bytes of a word."""
    if DEPTH == 8:
        return tl.load(pointers + QUAD * STRIDE)
    quad = _piece(tl.load(pointers + QUAD // 2 * STRIDE), 4 * (QUAD % 2), 0x0F0F0F0F)
    if DEPTH >= 6:
        pairs = tl.load(pointers + (4 + QUAD // 4) * STRIDE)
        quad |= _piece(pairs, 2 * (QUAD % 4) - 4, 0x30303030)
    if DEPTH == 5:
        quad |= _piece(tl.load(pointers + 4 * STRIDE), QUAD - 4, 0x10101010)
    if DEPTH == 7:
        quad |= _piece(tl.load(pointers + 6 * STRIDE), QUAD - 6, 0x40404040)
    return quad


@triton.jit
def in_order(a, b, c, d):
    """Join four (R,) tensors to (R, 4)."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 4)


@triton.jit
def chunk_codes(pointers, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Load a chunk of a tile: operand values (ROWS, 32) int32, columns in order.

    pointers: (ROWS,), the first word of every row.
    """
    if DEPTH <= 4:
        n0, n1, n2, n3 = load_nibbles(pointers, ROWS, DEPTH)
        words = in_order(n0, n1, n2, n3)[:, :, None]
        codes = (words >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    else:
        left = in_order(
            load_quad(pointers, ROWS, 0, DEPTH),
            load_quad(pointers, ROWS, 1, DEPTH),
            load_quad(pointers, ROWS, 2, DEPTH),
            load_quad(pointers, ROWS, 3, DEPTH),
        )
        right = in_order(
            load_quad(pointers, ROWS, 4, DEPTH),
            load_quad(pointers, ROWS, 5, DEPTH),
            load_quad(pointers, ROWS, 6, DEPTH),
            load_quad(pointers, ROWS, 7, DEPTH),
        )
        words = tl.join(left, right).permute(0, 2, 1).reshape(ROWS, 8)[:, :, None]
        codes = (words >> (8 * tl.arange(0, 4))[None, None, :]) & 255
    return codes.reshape(ROWS, 32)

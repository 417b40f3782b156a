"""The PTX instructions that the fast paths are made of, each beside its plain twin.

`permute` looks up four bytes at once in a table of eight bytes held in two registers: `prmt.b32`,
the selector's low four nibbles naming the bytes.  `dot4` multiplies four pairs of signed bytes and
adds the products: `dp4a`.  `prefetch` and `prefetch_ahead` ask for memory that later loads will
want, which is nothing to their twins.  Every kernel passes its constexpr `PTX`; where it is false
(Triton's interpreter, GPUs of other makers) the same kernel runs on the twins.  The tests prove
snippet and twin equal with an emulator of both instructions, over all selectors and random words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvxq_kernels.gpu.layout import LOOK_AHEAD, MAX_DEPTH, TILE_ROWS

PERMUTE_ASM = "prmt.b32 $0, $1, $2, $3;"
DOT4_ASM = "dp4a.s32.s32 $0, $1, $2, $3;"

_PERMUTE = tl.constexpr(PERMUTE_ASM)
_DOT4 = tl.constexpr(DOT4_ASM)


def _prefetches(rows: int) -> str:
    """Ask for `rows` × 256 bytes, LOOK_AHEAD words beyond a warp's pointers eight bytes apart."""
    first = 4 * LOOK_AHEAD
    places = (f"prefetch.global.L2 [$1+{first + 256 * row}];" for row in range(rows))
    return " ".join(places) + " mov.u32 $0, 0;"


_PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
_PREFETCH_AHEAD = tl.constexpr(tuple(map(_prefetches, range(MAX_DEPTH * TILE_ROWS[-1] // 64 + 1))))


@triton.jit
def permute(low, high, selector, PTX: tl.constexpr):
    """Four bytes of the eight in (low, high), int32 words, chosen by the selector's low nibbles.

    Bits 0–2 of a nibble are the byte's number; bit 3 set gives eight copies of its sign instead.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            _PERMUTE, "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        place = tl.arange(0, 4)
        nibble = (tl.expand_dims(selector + (low ^ low), -1) >> (4 * place)) & 15
        word = tl.where((nibble & 4) == 0, tl.expand_dims(low, -1), tl.expand_dims(high, -1))
        byte = (word >> ((nibble & 3) * 8)) & 255
        sign = (byte >> 7) * 255
        return tl.sum(tl.where(nibble < 8, byte, sign) << (8 * place), axis=-1)


@triton.jit
def dot4(first, second, total, PTX: tl.constexpr):
    """`total` plus the dot product of the four signed bytes of `first` and of `second` (int32)."""
    if PTX:
        return tl.inline_asm_elementwise(
            _DOT4, "=r,r,r,r", [first, second, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        up = 24 - 8 * tl.arange(0, 4)
        left = (tl.expand_dims(first, -1) << up) >> 24
        right = (tl.expand_dims(second, -1) << up) >> 24
        return total + tl.sum(left * right, axis=-1)


@triton.jit
def prefetch(pointers, PTX: tl.constexpr):
    """Bring what `pointers`, one for each lane, point at to the L2 cache."""
    if PTX:
        tl.inline_asm_elementwise(
            _PREFETCH, "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def prefetch_ahead(words, WORDS: tl.constexpr, PTX: tl.constexpr):
    """Bring WORDS words that lie LOOK_AHEAD beyond `words` to the L2 cache, or some more."""
    if PTX:
        tl.inline_asm_elementwise(
            _PREFETCH_AHEAD[(WORDS + 63) // 64], "=r,l", [words + 2 * tl.arange(0, 32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

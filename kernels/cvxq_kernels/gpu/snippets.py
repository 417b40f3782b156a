"""The two PTX instructions that the fast paths are made of, each beside its plain twin.

`permute` looks up four bytes at once in a table of eight bytes held in two registers: `prmt.b32`,
the selector's low four nibbles naming the bytes.  `dot4` multiplies four pairs of signed bytes and
adds the products: `dp4a`.  Every kernel passes its constexpr `PTX`; where it is false (Triton's
interpreter, GPUs of other makers) the same kernel runs on the twins.  The tests prove snippet and
twin equal with an emulator of both instructions, over all selectors and random words.
"""

from __future__ import annotations

import triton
import triton.language as tl

PERMUTE_ASM = "prmt.b32 $0, $1, $2, $3;"
DOT4_ASM = "dp4a.s32.s32 $0, $1, $2, $3;"

_PERMUTE = tl.constexpr(PERMUTE_ASM)
_DOT4 = tl.constexpr(DOT4_ASM)


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

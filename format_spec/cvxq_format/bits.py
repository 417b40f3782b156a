"""Streams of fixed-width unsigned integers, least significant bit first.

Value i of a stream of width w occupies bits i·w … i·w + w − 1, where bit p of the stream is
bit p mod 8 of byte p div 8. Eight values therefore fill exactly w bytes, which is what makes
both directions vectorizable: up to 8 bits, one 64-bit word carries eight values, and three
shift-and-mask steps spread them into eight bytes (or gather them back); wider values, of which
only row permutations are made, go through one strided column per byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_MAX_WIDTH = 56  # a value and its bit offset inside a byte still fit 64 bits


def stream_size(count: int, width: int) -> int:
    """Return the bytes that `count` values of `width` bits occupy."""
    return (count * width + 7) // 8


def _spread_steps(width: int) -> list[tuple[int, int, int]]:
    """Return (shift, mask of what stays, mask of what moves) for lanes of 64, 32, 16 bits."""
    steps = []
    for lane in (64, 32, 16):
        field = width * lane // 16
        stay = sum(((1 << field) - 1) << start for start in range(0, 64, lane))
        steps.append((lane // 2 - field, stay, stay << (lane // 2)))
    return steps


def pack_bits(values: npt.NDArray[np.integer], width: int) -> Bytes:
    """Pack unsigned values into a bit stream.

    values: any shape, read in C order, each in 0 … 2^width − 1; width: 0 … 56.
    Returns (stream_size,) uint8; spare bits of the last byte are zero.
    Raises ValueError if a value does not fit.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if not 0 <= width <= _MAX_WIDTH:
        raise ValueError(f"bit width {width}, allowed 0 to {_MAX_WIDTH}")
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >> width):
        raise ValueError(f"values {flat.min()} to {flat.max()} do not fit {width} bits")
    size = stream_size(flat.size, width)
    eights = -(-flat.size // 8)
    if width <= 8:
        padded = np.zeros(eights * 8, np.uint8)
        padded[: flat.size] = flat
        word = padded.view("<u8").astype(np.uint64)
        for shift, stay, move in reversed(_spread_steps(width)):
            word = (word & np.uint64(stay)) | ((word & np.uint64(move)) >> np.uint64(shift))
        packed = word.astype("<u8").view(np.uint8).reshape(eights, 8)[:, :width]
    else:
        wide = np.zeros(eights * 8, np.uint64)
        wide[: flat.size] = flat
        packed = np.zeros((eights, width), np.uint8)
        for i in range(8):
            first, offset = divmod(i * width, 8)
            shifted = wide[i::8] << np.uint64(offset)
            for t in range((offset + width + 7) // 8):
                packed[:, first + t] |= (shifted >> np.uint64(8 * t)).astype(np.uint8)
    return np.ascontiguousarray(packed).reshape(-1)[:size]


def unpack_bits(stream: Bytes, count: int, width: int) -> npt.NDArray[np.unsignedinteger]:
    """Unpack `count` values of `width` bits.

    stream: (stream_size(count, width),) uint8. Returns (count,) uint8 up to 8 bits, else uint64.
    Raises ValueError if the stream's size is wrong or its spare bits are not zero.
    """
    size = stream_size(count, width)
    if stream.size != size:
        raise ValueError(f"bit stream of {stream.size} bytes, {size} expected")
    if (count * width) % 8 and int(stream[-1]) >> ((count * width) % 8):
        raise ValueError("spare bits at the end of a bit stream are not zero")
    eights = -(-count // 8)
    padded = np.zeros(eights * width + 8, np.uint8)
    padded[:size] = stream
    if width <= 8:
        # Words overlap: the masks drop what belongs to the next one.
        word = np.ndarray(eights, "<u8", padded, strides=(width,)).astype(np.uint64)
        for shift, stay, move in _spread_steps(width):
            moved = word << np.uint64(shift)
            moved &= np.uint64(move)
            word &= np.uint64(stay)
            word |= moved
        return word.astype("<u8", copy=False).view(np.uint8)[:count]
    grouped = padded[: eights * width].reshape(eights, width)
    values = np.zeros(eights * 8, np.uint64)
    for i in range(8):
        first, offset = divmod(i * width, 8)
        for t in range((offset + width + 7) // 8):
            values[i::8] |= grouped[:, first + t].astype(np.uint64) << np.uint64(8 * t)
        values[i::8] >>= np.uint64(offset)
    return (values & np.uint64((1 << width) - 1))[:count]

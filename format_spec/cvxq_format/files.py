"""Carried files: which are stored deflated, and inflating them without trusting what they say."""

from __future__ import annotations

import zlib

from cvxq_format.entries import FileEntry
from cvxq_format.errors import CorruptError
from cvxq_format.limits import MAX_INFLATED_SIZE

SMALLEST_DEFLATED = 4096
"""Bytes from which on a file may be deflated; a rule of the writer, not of the format.

Less would save next to nothing, and the size of a short document whose figures are not known yet
would no longer be that of another one of equal length.
"""
_LEVEL = 7  # a fifth of the time of level 9, for 2 % more bytes
_WINDOW_BITS = 15  # the largest window; positive: with header and checksum of zlib


def stored(data: bytes) -> tuple[bytes, int | None]:
    """Return the bytes that a file takes in a container, and its size if these are deflated.

    They are where that saves more than a tenth. Another version of zlib may return other bytes.
    """
    if not SMALLEST_DEFLATED <= len(data) <= MAX_INFLATED_SIZE:
        return data, None
    deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS)
    deflated = deflater.compress(data) + deflater.flush()
    if 10 * len(deflated) >= 9 * len(data):
        return data, None
    return deflated, len(data)


def planned_entry(name: str, data: bytes) -> FileEntry:
    """Return the entry that a file will have, its place and its checksum left 0."""
    section, inflated_size = stored(data)
    return FileEntry(0, len(section), 0, name=name, inflated_size=inflated_size)


def inflate(data: bytes | memoryview, size: int) -> bytes:
    """Return the `size` ≥ 1 bytes that a zlib stream stands for, never asking for room for more.

    Raises CorruptError unless `data` is exactly one whole stream of exactly that many bytes.
    """
    stream = zlib.decompressobj(_WINDOW_BITS)
    try:
        found = stream.decompress(data, size)
        more = stream.decompress(stream.unconsumed_tail, 1)  # none: only the checksum is left
    except zlib.error as error:
        raise CorruptError(f"its zlib stream is damaged ({error})") from error
    if more:
        raise CorruptError(f"its zlib stream goes on after the {size} bytes stated")
    if not stream.eof:
        raise CorruptError(f"its zlib stream ends early, after {len(found)} of {size} bytes")
    if len(found) != size:
        raise CorruptError(f"its zlib stream has {len(found)} bytes, {size} stated")
    if stream.unused_data:
        raise CorruptError("bytes follow its zlib stream")
    return found

"""Memory that is freed is given back to the system, not kept for later.

glibc keeps blocks of up to 32 MB for itself once some were freed, between others that are in use: a
conversion that works block by block would end up holding several times what it needs. With a fixed
threshold every large tensor is a mapping of its own, and gone when it is freed. musl has such a
threshold anyway, and macOS gives large blocks back.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_TRIMMED_FROM = 1 << 17  # bytes, as glibc has it
_MAPPED_FROM = 1 << 20
_MOST_MAPPED_FROM = 1 << 25  # the largest that glibc takes
_NEVER = (1 << 31) - 1


def give_freed_memory_back() -> None:
    """Give back what was freed so far, and have large tensors be mappings of their own from now on.

    Sampling is better off without: it makes and frees its whole cache with every token.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_TRIM_THRESHOLD, _TRIMMED_FROM)
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
        library.malloc_trim(0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep what is freed for a while, then give it back.

    Where the same tensors are made again and again, as in steps of tuning, a quarter of the time
    would go to the system's clearing of their memory.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        library.mallopt(_M_MMAP_THRESHOLD, _MOST_MAPPED_FROM)
    try:
        yield
    finally:
        give_freed_memory_back()


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc: musl has none of this."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") else None

"""Memory that is freed is given back to the system, not kept for later.

glibc keeps blocks of up to 32 MB for itself once some were freed, between others that are in use: a
conversion that works block by block would end up holding several times what it needs. With a fixed
threshold every large tensor is a mapping of its own, and gone when it is freed. musl has such a
threshold anyway, and macOS gives large blocks back.
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of malloc.h
_THRESHOLD = 1 << 20  # bytes


def give_freed_memory_back() -> None:
    """Give back what was freed so far, and have large tensors be mappings of their own from now on.

    Sampling is better off without: it makes and frees its whole cache with every token.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # musl has neither
        library.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        library.malloc_trim(0)

"""The numbers that FORMAT.md fixes, in one place; the document gives each one's reason."""

from __future__ import annotations

MAGIC = b"\x89CVXQ\r\n\x1a"
VERSION = (1, 2)
ALIGNMENT = 64
PREAMBLE_SIZE = 128

MAX_DEPTH = 8
ALL_LEVEL_DEPTHS = 2**MAX_DEPTH - 1
MAX_HEADER_SIZE = 64 << 20
MAX_NESTING = 16
MAX_NAME_BYTES = 512
MAX_RANK = 8
MAX_DIMENSION = 1 << 40
MAX_ELEMENTS = 1 << 48
MAX_GROUP_SIZE = 1 << 16
MAX_CODEBOOKS = 256
MAX_WEIGHTS_PER_BYTE = 4096
"""Weights that one byte of a companded payload may stand for."""

MAX_INFLATED_SIZE = 256 << 20
MAX_INFLATION = 1032
"""Bytes that one byte of a deflated file may stand for; deflate cannot do more."""

FEATURES = {"cluster-maps": 1, "deflated-files": 2, "row-scales": 1, "short-codebooks": 1}
"""Required features that this reader knows, and the minor version that brought each."""


def align(offset: int) -> int:
    """Return the first multiple of 64 that is not below `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT

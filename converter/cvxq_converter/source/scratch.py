"""Large tensors that lie in files, so that they need no memory of their own.

A page of such a tensor is in memory while it is used, and in the file when the system wants the
memory for something else. The files have no names: they are gone with their tensors, whatever
becomes of the process.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from cvxq_converter.errors import CutShortError

SMALLEST = 1 << 20  # bytes that are worth a file
_PLACE = Path("/var/tmp")  # on a disk even where /tmp is memory


class Scratch:
    """A folder for tensors in files; by default the system's for large temporary files."""

    def __init__(self, folder: Path | None = None) -> None:
        usual = _PLACE if os.access(_PLACE, os.W_OK) else Path(tempfile.gettempdir())
        self.folder = folder or usual

    def file(self) -> BinaryIO:
        """An empty file without a name."""
        return cast(BinaryIO, tempfile.TemporaryFile(dir=self.folder))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros on the CPU; CutShortError if the disk has no room for it."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.zeros(*shape, dtype=dtype)
        try:
            with self.file() as file:
                _reserve(file.fileno(), size)
                mapping = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise CutShortError(
                f"{self.folder}: no room for {size / 1e6:.0f} MB of temporary data "
                f"({error.strerror}); use another folder (--scratch)"
            ) from None
        return torch.frombuffer(mapping, dtype=dtype).view(*shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """The values of a tensor in a file."""
        stored = self.zeros(tensor.shape, tensor.dtype)
        return stored.copy_(tensor)


def _reserve(descriptor: int, size: int) -> None:
    """Make a file of `size` bytes; OSError if the disk has no room, which would show too late."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # not on every system, nor on every file system
        unknown = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
        if isinstance(error, OSError) and error.errno not in unknown:
            raise
        os.ftruncate(descriptor, size)

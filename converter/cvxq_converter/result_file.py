"""Results of steps ↔ bytes of a file: a pickle, and the arrays and tensors beside it.

They are mapped from there. Only arrays and records of this package are taken from a file, never
other code. The suffix of its name is the checksum of all its bytes.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from dataclasses import is_dataclass
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

_LINE = 64  # bytes to which arrays are aligned
_PIECE = 1 << 20  # bytes whose checksum is taken at once


class _Pickler(pickle.Pickler):
    """Takes tensors, as bytes beside the pickle; arrays lie there anyway."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        dtype = str(value.dtype).removeprefix("torch.")
        return _tensor, (flat, dtype, tuple(value.shape), value.device.type)


def _tensor(flat: Any, dtype: str, shape: tuple[int, ...], device: str) -> Tensor:
    return torch.from_numpy(flat).view(getattr(torch, dtype)).view(shape).to(device)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        is_ours = module.startswith(("cvxq_converter.", "cvxq_format.")) and is_dataclass(found)
        arrays = ("dtype", "ndarray", "scalar", "_frombuffer", "_reconstruct")
        is_array = module.partition(".")[0] == "numpy" and name in arrays
        if is_ours or is_array or found is _tensor:
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def dump(result: object, file: BinaryIO) -> int:
    """Write a result; returns the checksum of what was written."""
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(result)
    raw = [buffer.raw() for buffer in buffers]
    sizes = [stream.tell(), *(len(part) for part in raw)]
    head = struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes)
    parts: list[Buffer] = [head, stream.getbuffer(), *raw]
    checksum, place = 0, 0
    for part in parts:
        for piece in (bytes(-place % _LINE), part):
            checksum = zlib.crc32(piece, checksum)
            place += file.write(piece)
    return checksum


def load(path: Path) -> Any:
    """Read a result, its arrays mapped; whoever writes to one does so in memory of his own.

    Raises an exception of some kind for a file that is damaged or that holds anything else.
    """
    with path.open("rb") as file:
        content = memoryview(mmap(file.fileno(), 0, access=ACCESS_COPY))
    checksum = 0
    for start in range(0, len(content), _PIECE):
        checksum = zlib.crc32(content[start : start + _PIECE], checksum)
    if path.suffix != f".{checksum:08x}":
        raise ValueError("damaged")
    (count,) = struct.unpack_from("<Q", content)
    place, parts = 8 * (count + 1), []
    for size in struct.unpack_from(f"<{count}Q", content, 8):
        place += -place % _LINE
        parts.append(content[place : place + size])
        place += size
    return _Unpickler(io.BytesIO(parts[0]), buffers=parts[1:]).load()

"""Tensors stored as they are, bfloat16 included, which numpy does not know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvxq_format.errors import CorruptError, WriteError

_NUMPY = {
    "bool": "|u1",
    "u8": "|u1",
    "i8": "|i1",
    "i16": "<i2",
    "i32": "<i4",
    "i64": "<i8",
    "f16": "<f2",
    "bf16": "<u2",
    "f32": "<f4",
    "f64": "<f8",
}
DTYPE_SIZES = {name: np.dtype(code).itemsize for name, code in _NUMPY.items()}
_FROM_NUMPY = {
    np.dtype(code): name for name, code in _NUMPY.items() if name not in ("bool", "bf16")
} | {np.dtype(np.bool_): "bool"}


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor as stored; `data` has `shape`, and holds the bit patterns (uint16) of a bf16."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.generic]

    def to_float32(self) -> npt.NDArray[np.float32]:
        """Return the values as float32; exact for bf16, f16 and f32."""
        if self.dtype == "bf16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        return self.data.astype(np.float32)


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16, nearest even, and return the bit patterns as uint16."""
    word = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (word.astype(np.uint64) + 0x7FFF + ((word >> 16) & 1)) >> 16
    quiet = (word >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def encode(array: npt.NDArray[np.generic], dtype: str | None) -> tuple[str, npt.NDArray[np.uint8]]:
    """Return the dtype name and little-endian bytes of an array.

    dtype: needed only for "bf16", whose array holds bit patterns as uint16.
    Raises WriteError if the array's dtype cannot be stored or is not the one named.
    """
    if dtype == "bf16":
        if array.dtype != np.uint16:
            raise WriteError(f"bf16 array of {array.dtype}, expected its bit patterns as uint16")
        name = "bf16"
    else:
        found = _FROM_NUMPY.get(array.dtype.newbyteorder("<"))
        if found is None or dtype not in (None, found):
            allowed = ", ".join(_NUMPY)
            raise WriteError(f"raw array of {array.dtype} as {dtype}, allowed {allowed}")
        name = found
    stored = np.ascontiguousarray(array).astype(_NUMPY[name], copy=False)
    return name, stored.reshape(-1).view(np.uint8)


def decode(dtype: str, shape: tuple[int, ...], data: memoryview) -> RawTensor:
    """Return a read-only view of `data`; raises CorruptError if a bool is neither 0 nor 1."""
    values = np.frombuffer(data, _NUMPY[dtype]).reshape(shape)
    if dtype == "bool":
        if values.size and values.max() > 1:
            raise CorruptError(f"bool byte {values.max()}, allowed 0 or 1; the file is corrupt")
        values = values.view(np.bool_)
    return RawTensor(dtype, shape, values)

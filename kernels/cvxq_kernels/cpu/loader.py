"""The compiled library: where it lies, and its C functions declared for ctypes (native/cvxq.h)."""

from __future__ import annotations

import ctypes
import zlib
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_uint32, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent


class Companded(ctypes.Structure):
    """`cvxq_companded`: a matrix as the file's payload holds it, by pointers."""

    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("group_size", c_int64),
        ("partitions", c_int64),
        ("transposed", c_int),
        ("depths", c_void_p),
        ("scale_codes", c_void_p),
        ("mean_codes", c_void_p),
        ("permutation", c_void_p),
        ("order", c_void_p),
        ("codes", c_void_p),
        ("code_bytes", c_int64),
        ("pages", c_void_p),
        ("page_bytes", c_int64),
        ("scales", c_void_p),
        ("means", c_void_p),
        ("levels", c_void_p),
        ("row_scales", c_void_p),
        ("bias", c_void_p),
        ("file", c_int),
    ]


_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "cvxq_pool_new": (c_void_p, [c_int]),
    "cvxq_pool_free": (None, [c_void_p]),
    "cvxq_pool_threads": (c_int, [c_void_p]),
    "cvxq_matrix_pack": (c_void_p, [c_void_p, POINTER(Companded)]),
    "cvxq_matrices_pack": (None, [c_void_p, POINTER(Companded), c_int64, POINTER(c_void_p)]),
    "cvxq_matrix_dense": (c_void_p, [c_void_p, c_void_p, c_int, c_int64, c_int64, c_void_p]),
    "cvxq_matrix_free": (None, [c_void_p]),
    "cvxq_matrix_outputs": (c_int64, [c_void_p]),
    "cvxq_matrix_inputs": (c_int64, [c_void_p]),
    "cvxq_matrix_bytes": (c_int64, [c_void_p]),
    "cvxq_matmul": (
        None,
        [c_void_p, POINTER(c_void_p), c_int, c_void_p, c_int64, POINTER(c_void_p), c_int],
    ),
    "cvxq_rows": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p]),
    "cvxq_isa": (c_char_p, []),
    "cvxq_force_isa": (c_int, [c_char_p]),
    "cvxq_crc32": (c_int, [c_void_p, c_int64, POINTER(c_uint32)]),
    "cvxq_catch_bus_errors": (c_int, [c_char_p, c_int]),
    "cvxq_read_through": (ctypes.c_uint64, [c_void_p, c_void_p, c_int64]),
}


def find_library() -> Path | None:
    """Path of the library that the build put beside this file, if it did."""
    for suffix in reversed(EXTENSION_SUFFIXES):  # the build's is the last, without a version
        path = FOLDER / f"_native{suffix}"
        if path.exists():
            return path
    return None


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library with its functions declared, or None and the reason."""
    path = find_library()
    if path is None:
        return None, (
            f"the compiled CPU kernels are missing from {FOLDER}: "
            "install a C compiler (gcc or clang) and install cvxq again"
        )
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError) as error:
        return None, f"the compiled CPU kernels cannot be loaded ({error}): install cvxq again"
    return loaded, ""


def native() -> ctypes.CDLL:
    """Return the library; RuntimeError, one line, if there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def is_available() -> bool:
    """Whether the native kernels can be used here."""
    return _load()[0] is not None


def why_not() -> str:
    """One line saying why the native kernels cannot be used; empty if they can."""
    return _load()[1]


def isa() -> str:
    """Name of the instruction set in use: "avx512", "avx2", "neon" or "scalar"."""
    return str(native().cvxq_isa().decode())


def force_isa(name: str) -> bool:
    """Use instruction set `name` from now on, "" for the best; False if it is not to be had."""
    return bool(native().cvxq_force_isa(name.encode()))


def catch_bus_errors(line: str, exit_code: int) -> bool:
    """End this process with a line on stderr where a mapped file is made shorter while it is read.

    False where the library is missing or the system does not tell; then a signal ends the process.
    """
    loaded, _ = _load()
    return loaded is not None and bool(
        loaded.cvxq_catch_bus_errors(f"{line}\n".encode(), exit_code)
    )


def crc32(data: memoryview | bytes) -> int:
    """Return zlib's CRC-32 of `data`, several times as fast where library and processor can."""
    loaded, crc = _load()[0], c_uint32()
    array = np.frombuffer(data, np.uint8)
    if loaded is None or not loaded.cvxq_crc32(array.ctypes.data, array.size, byref(crc)):
        return zlib.crc32(data)
    return crc.value

"""Sections that a worker has read before, byte for byte, are not decoded again.

Most sections of a hostile file are those of a sound one, and reading one is a function of its
bytes and its entry. What fails is never remembered: its message names a place.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from cvxq_format import companded
from cvxq_format.codebook import Codebook
from cvxq_format.entries import CompandedEntry
from cvxq_format.header import Header
from cvxq_format.tensor import CompandedTensor

_SECTIONS = 2048
_HEADERS = 4  # of one case: verifying opens a file once, inspecting it does again

_decode = companded.decode
_read_codebook = Codebook.from_bytes
_read_header = Header.from_bytes


@lru_cache(maxsize=_SECTIONS)
def _decoded(entry: CompandedEntry, payload: bytes, codebook: Codebook) -> CompandedTensor:
    return _decode(entry, payload, codebook)


@lru_cache(maxsize=_SECTIONS)
def _codebook(data: bytes, *layout: int) -> Codebook:
    return _read_codebook(data, *layout)


@lru_cache(maxsize=_HEADERS)
def _header(data: bytes, lenient: bool) -> Header:
    return _read_header(data, lenient)


def _decode_once(entry: CompandedEntry, payload: Any, codebook: Codebook) -> CompandedTensor:
    try:
        return _decoded(replace(entry, offset=0, crc32=0), bytes(payload), codebook)
    except Exception:
        return _decode(entry, payload, codebook)


def remember() -> None:
    """Have all readers of this process remember."""
    companded.decode = _decode_once
    Codebook.from_bytes = lambda data, *layout: _codebook(bytes(data), *layout)  # type: ignore[method-assign]
    Header.from_bytes = _header  # type: ignore[method-assign]


def forget() -> None:
    """Have all readers of this process read everything."""
    companded.decode = _decode
    Codebook.from_bytes = _read_codebook  # type: ignore[method-assign]
    Header.from_bytes = _read_header  # type: ignore[method-assign]

"""How many bytes of codes a target leaves: a rate of the matrices, or a size of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cvxq_format import CompandedEntry, Header, Reader
from cvxq_format.limits import PREAMBLE_SIZE, align

from cvxq_converter.allocate.allocation import (
    BitAllocation,
    Worths,
    allocate_bit_depths,
    code_bytes,
)
from cvxq_converter.errors import RateError

REPORT_RESERVE = 256  # bytes that the quality report may grow by once its figures are known
FITTING_ROUNDS = 8
LARGEST_GROWTH = 128  # bytes of alignment and of digits in the header that codes add per tensor


def allocate_for_rate(
    worths: Sequence[Worths], thresholds: np.ndarray, bits: float, weights: int, side_bytes: int
) -> BitAllocation:
    """Allocate so that codes and side information together take `bits` per weight, or just less.

    side_bytes: everything else that the quantized matrices need in the file.
    """
    budget = int(bits * weights / 8) - side_bytes
    if budget < 0:
        needed = 8 * side_bytes / weights
        raise RateError(
            f"--bits {bits:g}: the side information alone takes {needed:.2f} bits per weight; "
            "ask for more, or use a larger --group-size"
        )
    return allocate_bit_depths(worths, thresholds, budget)


def allocate_for_size(
    worths: Sequence[Worths],
    thresholds: np.ndarray,
    size_bytes: int,
    empty_header: Header,
    side_sizes: Mapping[str, int],
) -> BitAllocation:
    """Allocate so that the whole file takes at most `size_bytes`, and hardly less.

    empty_header: header of the same file with all depths 0. side_sizes: tensor name → bytes of
    its payload without codes, in the order of the worths.
    """
    names = list(side_sizes)

    def planned(code_sizes: Sequence[int]) -> int:
        sizes = {n: side_sizes[n] + c for n, c in zip(names, code_sizes, strict=True)}
        return file_size(empty_header, sizes) + REPORT_RESERVE

    smallest = planned([0] * len(names))
    budget = size_bytes - smallest
    if budget < 0:
        raise RateError(
            f"--size {size_bytes}: even with every weight pruned the file takes {smallest} bytes"
        )
    for left in reversed(range(FITTING_ROUNDS)):
        allocation = allocate_bit_depths(worths, thresholds, budget)
        codes = [
            code_bytes(d, w.group_bytes) for d, w in zip(allocation.depths, worths, strict=True)
        ]
        excess = planned(codes) - size_bytes
        if excess <= 0:
            return allocation
        budget -= excess
        if left == 1:  # alignment jumps to and fro: leave room for the most that it can take
            budget = max(0, min(budget, size_bytes - smallest - LARGEST_GROWTH * len(names)))
    raise AssertionError("the file size does not settle")


def file_size(header: Header, payload_sizes: Mapping[str, int]) -> int:
    """Bytes of the file with this header after the companded payloads take these sizes.

    Exact but for the checksums, which are counted at their longest.
    """
    end = PREAMBLE_SIZE
    moved: dict[int, Any] = {}
    for _, name, section in sorted(header.sections(), key=lambda s: s[2].offset):
        is_companded = isinstance(section, CompandedEntry)
        size = payload_sizes[name] if is_companded else section.size
        moved[id(section)] = replace(section, offset=align(end), size=size, crc32=0xFFFFFFFF)
        end = align(end) + size
    header = replace(
        header,
        tensors=type(header.tensors)(moved[id(t)] for t in header.tensors),
        codebooks=type(header.codebooks)(moved[id(c)] for c in header.codebooks),
        files=type(header.files)(moved[id(f)] for f in header.files),
    )
    return align(end) + len(header.to_bytes())


def empty_file_header(write: Callable[[Path], None]) -> Header:
    """Header of the file that `write` makes; it is written to a temporary folder and removed."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "empty.cvxq"
        write(path)
        with Reader(path) as reader:
            return reader.header

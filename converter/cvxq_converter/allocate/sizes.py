"""What everything in a file takes, computed from names, shapes and types, and what a target leaves.

A rate counts all that the quantized matrices need: their side information, the codebook, and the
biases that layers gain. A size counts the whole file. Either leaves a number of bytes for codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from cvxq_format import CompandedEntry, Header, depth_histogram
from cvxq_format.codebook import DEPTHS, codebook_size, depth_mask
from cvxq_format.decoder_record import FILE_NAME as DECODER_FILE
from cvxq_format.entries import CodebookEntry, RawEntry, Section
from cvxq_format.files import planned_entry
from cvxq_format.limits import MAX_DEPTH, PREAMBLE_SIZE, align

from cvxq_converter.allocate.allocation import (
    BitAllocation,
    Worths,
    allocate_bit_depths,
    code_bytes,
)
from cvxq_converter.allocate.bias import BIAS_BITS
from cvxq_converter.allocate.plan import MatrixPlan
from cvxq_converter.allocate.scale_width import choose_scale_bits
from cvxq_converter.errors import NotDescribedError, RateError
from cvxq_converter.options import Method, Target
from cvxq_converter.source.decoding import record_bytes
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix

FITTED_SAVES = 0.2  # bits per weight, by levels fitted to the weights instead of the compander's
FITTING_ROUNDS = 8
LARGEST_GROWTH = 128  # bytes of alignment and of digits in the header that codes add per tensor
_LARGEST_CRC32 = 0xFFFFFFFF
_NAMES = {
    torch.bool: "bool",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
}
Placed = TypeVar("Placed", bound=Section)


@dataclass(frozen=True)
class Ledger:
    """Every section of a file whose codes are still to be chosen, with its size.

    header: the quantized matrices first among the tensors, in the order of their plans, each of
    the size of its side information; the codebook with all level tables. scale_bits: of a scale
    code. weights: in the quantized matrices.
    """

    header: Header
    scale_bits: int
    weights: int

    def side_bytes(self, stored_depths: tuple[int, ...]) -> int:
        """Bytes that a rate counts beside the codes, with the level tables of these depths."""
        counted = [
            entry.size
            for entry in self.header.tensors
            if isinstance(entry, CompandedEntry) or entry.name in self.header.added_biases
        ]
        return sum(counted) + codebook_size(self.scale_bits, depth_mask(stored_depths))

    def file_bytes(self, code_sizes: Sequence[int], stored_depths: tuple[int, ...]) -> int:
        """Bytes of the file with codes of these sizes, in the order of the plans."""
        count, mask = len(code_sizes), depth_mask(stored_depths)
        matrices, others = self.header.tensors[:count], self.header.tensors[count:]
        filled = [
            replace(entry, size=entry.size + size)
            for entry, size in zip(matrices, code_sizes, strict=True)
        ]
        size = codebook_size(self.scale_bits, mask)
        books = [replace(book, level_depths=mask, size=size) for book in self.header.codebooks]
        return file_size(replace(self.header, tensors=(*filled, *others), codebooks=tuple(books)))


def make_ledger(
    loaded: LoadedModel,
    plans: Sequence[MatrixPlan],
    gained: Sequence[Matrix],
    documents: Mapping[str, bytes],
    method: Method,
) -> Ledger:
    """List what the file of a model will hold.

    gained: the matrices that gain a bias. documents: what the converter adds to the files carried
    from the source, by name; the decoder's record is added to them where there is one. Where their
    figures are still unknown, others of equal length will do for a document too short to be
    deflated.
    """
    scale_bits = choose_scale_bits(plans)
    carried = dict(documents)
    try:
        record = loaded.describe([m.bias_name for m in gained if m.bias_name is not None])
        carried[DECODER_FILE] = record_bytes(record)
    except NotDescribedError:
        pass
    added = (planned_entry(name, data) for name, data in carried.items())
    matrices = [matrix_entry(plan, scale_bits, method) for plan in plans]
    biases = [_bias_entry(matrix) for matrix in gained]
    raw = [raw_entry(name, value) for name, value in loaded.unquantized()]
    header = Header(
        tensors=(*matrices, *raw, *biases),
        aliases=tuple(sorted(loaded.aliases.items())),
        added_biases=tuple(entry.name for entry in biases),
        codebooks=(CodebookEntry(0, codebook_size(scale_bits), 0, scale_bits=scale_bits),),
        files=(*loaded.source.planned_files, *added),
    )
    return Ledger(header, scale_bits, loaded.quantized_weights)


def matrix_entry(plan: MatrixPlan, scale_bits: int, method: Method) -> CompandedEntry:
    """The entry of a quantized matrix; its size is that of the side information."""
    clustering, worths = plan.clustering, plan.worths
    has_map = clustering.is_permuted and clustering.clusters > clustering.partitions
    entry = CompandedEntry(
        *(0, 0, 0),
        name=plan.matrix.name,
        shape=tuple(plan.matrix.weight.shape),
        codebook=0,
        group_size=method.group_size,
        partitions=clustering.partitions,
        transposed=False,
        source_orientation=plan.matrix.source_orientation,
        depths="separable" if worths.column_terms is not None else "explicit",
        column_bits=worths.column_bits,
        column_shift=worths.column_shift,
        means=plan.with_means,
        permuted=has_map,
        cluster_map=has_map,
        row_scale_bits=plan.row_scales.bits,
    )
    return replace(entry, size=entry.layout(scale_bits).side_bytes)


def raw_entry(name: str, value: torch.Tensor) -> RawEntry:
    """The entry of a tensor that is stored element by element."""
    dtype = stored_dtype(value)
    kind = _NAMES.get(dtype, str(dtype))  # the writer refuses a type that the format lacks
    shape = tuple(value.shape)
    return RawEntry(0, value.numel() * dtype.itemsize, 0, name=name, dtype=kind, shape=shape)


def _bias_entry(matrix: Matrix) -> RawEntry:
    assert matrix.bias_name is not None
    rows = len(matrix.weight)
    return RawEntry(0, rows * BIAS_BITS // 8, 0, name=matrix.bias_name, dtype="bf16", shape=(rows,))


def stored_dtype(value: torch.Tensor) -> torch.dtype:
    """The narrowest type that does an unquantized tensor justice.

    bfloat16 or float16 where that is exact, or for any matrix (bfloat16 if float16 would
    overflow); a vector that needs 32 bits keeps them. Integers and booleans stay what they are.
    """
    if not value.is_floating_point():
        return value.dtype
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(value.to(dtype).to(value.dtype), value):
            return dtype
    if value.ndim < 2:
        return torch.float32
    fits = bool(value.abs().max() < torch.finfo(torch.float16).max)
    return torch.float16 if fits else torch.bfloat16


def file_size(header: Header) -> int:
    """Bytes of the file whose sections have the sizes in `header`.

    They lie in the order codebooks, files, tensors. Exact but for the checksums, whose digits are
    counted at their most.
    """
    end = PREAMBLE_SIZE

    def place(section: Placed) -> Placed:
        nonlocal end
        start, end = align(end), align(end) + section.size
        return replace(section, offset=start, crc32=_LARGEST_CRC32)

    header = replace(
        header,
        required=tuple(sorted(header.used_features())),
        codebooks=tuple(map(place, header.codebooks)),
        files=tuple(map(place, header.files)),
        tensors=tuple(map(place, header.tensors)),
    )
    return align(end) + len(header.to_bytes())


def allocate(plans: Sequence[MatrixPlan], target: Target, ledger: Ledger) -> BitAllocation:
    """Allocate for a rate or a size, with the level tables in the file that pay.

    The first attempt has all of them. A table of 2^B numbers pays if the weights of depth B save
    more by it than it takes; the others use the compander's levels.
    Raises RateError for a target that cannot be met.
    """
    worths = [plan.worths for plan in plans]

    def attempt(stored_depths: tuple[int, ...]) -> BitAllocation:
        if target.bits is not None:
            side = ledger.side_bytes(stored_depths)
            return allocate_for_rate(worths, target.bits, ledger.weights, side)
        assert target.size_bytes is not None
        planned = partial(ledger.file_bytes, stored_depths=stored_depths)
        return allocate_for_size(worths, target.size_bytes, planned)

    first = attempt(DEPTHS)
    weights = np.zeros(MAX_DEPTH + 1, np.int64)
    for plan, depths in zip(plans, first.depths, strict=True):
        weights += depth_histogram(depths, plan.clustering.cluster_rows)
    pays = tuple(d for d in DEPTHS if weights[d] * FITTED_SAVES > 32 << d)
    return replace(attempt(pays), stored_depths=pays)


def allocate_for_rate(
    worths: Sequence[Worths], bits: float, weights: int, side_bytes: int
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
    return allocate_bit_depths(worths, budget)


def allocate_for_size(
    worths: Sequence[Worths], size_bytes: int, planned: Callable[[Sequence[int]], int]
) -> BitAllocation:
    """Allocate so that the whole file takes at most `size_bytes`, and hardly less.

    planned: bytes of the file with codes of these sizes, in the order of the worths.
    """
    smallest = planned([0] * len(worths))
    budget = size_bytes - smallest
    if budget < 0:
        raise RateError(
            f"--size {size_bytes}: even with every weight pruned the file takes {smallest} bytes; "
            "give more"
        )
    for left in reversed(range(FITTING_ROUNDS)):
        allocation = allocate_bit_depths(worths, budget)
        codes = [
            code_bytes(d, w.group_bytes) for d, w in zip(allocation.depths, worths, strict=True)
        ]
        excess = planned(codes) - size_bytes
        if excess <= 0:
            return allocation
        budget -= excess
        if left == 1:  # alignment jumps to and fro: leave room for the most that it can take
            budget = max(0, min(budget, size_bytes - smallest - LARGEST_GROWTH * len(worths)))
    raise AssertionError("the file size does not settle")

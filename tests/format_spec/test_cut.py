"""Parts of a matrix, dequantized and joined, are the whole, bit for bit."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from cvxq_format import CompandedTensor, dequantize
from format_strategies import CODEBOOKS, tensors  # type: ignore[import-not-found]
from hypothesis import given, settings
from hypothesis import strategies as st

ALONG: tuple[tuple[Literal["rows", "columns"], int], ...] = (("rows", -2), ("columns", -1))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tensors(), st.integers(1, 4))
def test_parts_join_to_the_whole(drawn: tuple[CompandedTensor, np.ndarray], size: int) -> None:
    tensor, _ = drawn
    book = CODEBOOKS[tensor.scale_bits]
    whole = dequantize(tensor, book)
    for along, axis in ALONG:
        of_stored_rows = (along == "rows") != tensor.transposed
        if (tensor.partitions if of_stored_rows else tensor.columns) % size:
            with pytest.raises(ValueError, match="which the number of parts has to divide"):
                tensor.cut(along, 0, size)
            continue
        parts = [tensor.cut(along, rank, size) for rank in range(size)]
        joined = np.concatenate([dequantize(part, book) for part in parts], axis=axis)
        np.testing.assert_array_equal(joined, whole)
        assert sum(part.packed_codes.size for part in parts) == tensor.packed_codes.size


def test_what_cannot_be_cut() -> None:
    from cvxq_format import pack_codes

    tensor = CompandedTensor(
        shape=(8, 6),
        group_size=2,
        partitions=2,
        scale_unit=np.float32(1),
        depths=np.full((1, 4, 6), 3, np.uint8),
        scale_codes=np.zeros((1, 4, 6), np.uint8),
        packed_codes=pack_codes(np.zeros((8, 6), np.uint8), np.full((4, 6), 3, np.uint8), 2, 2),
    )
    assert tensor.cut("rows", 1, 2).shape == (4, 6)
    assert tensor.cut("columns", 2, 3).shape == (8, 2)
    for along, rank, size in (("rows", 0, 4), ("columns", 0, 4), ("rows", 2, 2), ("rows", -1, 2)):
        with pytest.raises(ValueError, match="which the number of parts has to divide"):
            tensor.cut(along, rank, size)  # type: ignore[arg-type]

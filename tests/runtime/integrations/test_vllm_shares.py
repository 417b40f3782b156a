"""What ranks share of a matrix, dequantized and joined, is the whole, however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cvxq.integrations.vllm import shares
from cvxq.integrations.vllm.shares import share
from cvxq_format import Codebook, CompandedTensor, dequantize
from cvxq_kernels import cpu

BOOK = Codebook.default()
KINDS: tuple[dict[str, Any], ...] = (
    {"partitions": 1},
    {"partitions": 2},
    {"partitions": 1, "permuted": False, "means": False},
    {"transposed": True},
    {"transposed": True, "permuted": False},
)

Make = Callable[..., CompandedTensor]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_shares_join_to_the_whole(
    options: dict[str, Any], along: shares.Along, random_companded: Make, monkeypatch: Any
) -> None:
    monkeypatch.setattr(shares, "_CODES_AT_ONCE", 2000)  # several steps
    tensor = random_companded((72, 56), 3, **options)
    axis = ("rows", "columns").index(along)
    whole = dequantize(tensor, BOOK)
    for ends in ((0, 72 - 16 * axis), (0, 36, 56), (0, 1, 17, 40, 41, 56)):
        parts = []
        for start, stop in pairwise(ends):
            dense = dequantize(share(tensor, along, start, stop), BOOK)
            parts.append(dense.take(range(stop - start), axis))
        np.testing.assert_array_equal(
            np.concatenate(parts, axis), whole.take(range(ends[-1]), axis)
        )


def test_an_even_share_is_cut_out_as_it_lies(random_companded: Make) -> None:
    tensor = random_companded((72, 56), 3, partitions=2)
    assert share(tensor, "rows", 0, 72) is tensor
    assert share(tensor, "rows", 36, 72).shape == (36, 56)  # no filler
    assert share(tensor, "columns", 14, 28).shape == (72, 14)
    with pytest.raises(ValueError, match="rows 0 to 73"):
        share(tensor, "rows", 0, 73)


def test_a_share_of_mixed_clusters_is_about_as_small(random_companded: Make) -> None:
    tensor = random_companded((256, 64), 0, partitions=1, group_size=64)
    parts = [share(tensor, "rows", start, start + 128) for start in (0, 128)]
    sizes = [part.packed_codes.size for part in parts]
    assert tensor.packed_codes.size <= sum(sizes) <= 1.4 * tensor.packed_codes.size


@pytest.mark.skipif(not cpu.is_available(), reason="needs the native library")
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernels_take_shares(transposed: bool, random_companded: Make) -> None:
    tensor = random_companded((72, 56), 5, transposed=transposed)
    x = np.random.default_rng(0).standard_normal((3, 56), np.float32)
    expected = x @ dequantize(tensor, BOOK)[10:50].T
    part = cpu.Matrix.from_tensor(share(tensor, "rows", 10, 50), BOOK)
    np.testing.assert_allclose(part.matmul(x, exact=True)[:, :40], expected, atol=1e-4)
    part = cpu.Matrix.from_tensor(share(tensor, "columns", 10, 50), BOOK)
    padded = np.pad(x[:, 10:50], ((0, 0), (0, part.shape[1] - 40)))
    expected = x[:, 10:50] @ dequantize(tensor, BOOK)[:, 10:50].T
    np.testing.assert_allclose(part.matmul(padded, exact=True), expected, atol=1e-4)

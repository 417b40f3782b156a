"""How many bytes of codes a target leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cvxq_converter.allocate.allocation import MODEL_THRESHOLDS, Worths, free_worths
from cvxq_converter.allocate.sizes import (
    REPORT_RESERVE,
    allocate_for_rate,
    allocate_for_size,
    empty_file_header,
    file_size,
)
from cvxq_converter.errors import RateError
from cvxq_format import Codebook, CompandedTensor, Header, Writer
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = np.full(16, 64)


def worths(seed: int, columns: int = 40) -> Worths:
    """Two thousand bytes per bit of mean depth and more: 16 clusters of 64 rows."""
    return free_worths(np.random.default_rng(seed).normal(0, 1, (16, columns)), ROWS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 32), st.floats(0.5, 7.9), st.integers(0, 900))
def test_codes_and_side_information_together_never_exceed_the_rate(
    seed: int, bits: float, side_bytes: int
) -> None:
    both = [worths(seed), worths(seed + 1)]
    weights = 2 * 16 * 64 * 40
    found = allocate_for_rate(both, MODEL_THRESHOLDS, bits, weights, side_bytes)
    allowed = bits * weights / 8  # bytes: a rate computed from them could round to above `bits`
    assert 0.995 * allowed <= found.code_bytes + side_bytes <= allowed


def test_a_rate_below_the_side_information_names_what_it_takes() -> None:
    with pytest.raises(RateError, match=r"^--bits 1: .* takes 2\.00 bits .* --group-size$"):
        allocate_for_rate([worths(0)], MODEL_THRESHOLDS, 1.0, weights=400, side_bytes=100)


@pytest.fixture(scope="module")
def header(random_companded: Callable[..., CompandedTensor]) -> Header:
    """Header of a file with two companded tensors, a raw one and a carried file."""

    def write(path: Path) -> None:
        with Writer(path, codebooks=[Codebook.default()]) as writer:
            writer.add_file("config.json", b"{}" * 100)
            for i, name in enumerate(("a.weight", "b.weight")):
                writer.add_companded(name, random_companded((48, 20), i))
            writer.add_raw("norm.weight", np.ones(17, np.float32))

    return empty_file_header(write)


def test_the_empty_file_is_only_looked_at(header: Header) -> None:
    assert [t.name for t in header.tensors] == ["a.weight", "b.weight", "norm.weight"]


@pytest.mark.parametrize("size_bytes", [12_000, 20_011, 31_999])
def test_the_planned_file_fills_the_size_and_never_exceeds_it(
    header: Header, size_bytes: int
) -> None:
    sides = {"a.weight": 900, "b.weight": 1100}
    found = allocate_for_size([worths(1), worths(2)], MODEL_THRESHOLDS, size_bytes, header, sides)
    codes = [int(d.sum()) * 8 for d in found.depths]  # 64 rows: 8 bytes a plane
    assert sum(codes) == found.code_bytes
    sizes = {n: s + c for (n, s), c in zip(sides.items(), codes, strict=True)}
    planned = file_size(header, sizes) + REPORT_RESERVE
    assert size_bytes - 128 <= planned <= size_bytes


def test_a_size_below_the_empty_file_names_the_least(header: Header) -> None:
    sides = {"a.weight": 900, "b.weight": 1100}
    least = file_size(header, sides) + REPORT_RESERVE
    both = [worths(1), worths(2)]
    with pytest.raises(RateError, match=rf"^--size 1000: .* pruned the file takes {least} bytes$"):
        allocate_for_size(both, MODEL_THRESHOLDS, 1000, header, sides)
    assert allocate_for_size(both, MODEL_THRESHOLDS, least, header, sides).code_bytes == 0


def test_sizes_settle_however_many_small_matrices_are_aligned(
    random_companded: Callable[..., CompandedTensor],
) -> None:
    """Forty matrices of a few bytes each: what alignment takes is as much as the codes."""
    names = [f"layer.{i}.weight" for i in range(40)]

    def write(path: Path) -> None:
        with Writer(path, codebooks=[Codebook.default()]) as writer:
            for i, name in enumerate(names):
                writer.add_companded(name, random_companded((16, 20), i))

    empty = empty_file_header(write)
    rng = np.random.default_rng(0)
    small = [free_worths(rng.normal(0, 1, (2, 5)), np.full(2, 8)) for _ in names]
    least = file_size(empty, dict.fromkeys(names, 100)) + REPORT_RESERVE
    for size_bytes in range(least, least + 3000, 37):
        sides = dict.fromkeys(names, 100)
        found = allocate_for_size(small, MODEL_THRESHOLDS, size_bytes, empty, sides)
        sizes = {n: 100 + int(d.sum()) for n, d in zip(names, found.depths, strict=True)}
        assert file_size(empty, sizes) + REPORT_RESERVE <= size_bytes

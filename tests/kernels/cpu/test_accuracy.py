"""What rounding inside the kernel adds, against what quantization itself costs, depth by depth."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from cvxq_format import Codebook, CompandedTensor, dequantize, pack_codes
from cvxq_kernels import cpu

COLUMNS, ROWS = 512, 64


def normal_levels(depth: int, skew: float) -> np.ndarray:
    """Levels that minimize the squared error of normal weights (Lloyd's iteration), float32.

    skew: 0 makes them exactly symmetric, as the converter does.
    """
    sample = np.random.default_rng(0).standard_normal(50_000)
    sample.sort()
    levels = np.quantile(sample, (np.arange(2**depth) + 0.5) / 2**depth)
    for _ in range(60):
        edges = np.searchsorted(sample, (levels[1:] + levels[:-1]) / 2)
        ends = np.concatenate([[0], edges, [sample.size]])
        sums = np.concatenate([[0.0], np.cumsum(sample)])
        counts = np.maximum(np.diff(ends), 1)
        levels = np.where(np.diff(ends) > 0, np.diff(sums[ends]) / counts, levels)
    levels = (levels - levels[::-1]) / 2
    return (levels * np.exp(skew * levels)).astype(np.float32)


@cache
def codebook(kind: str) -> Codebook:
    default = Codebook.default()
    if kind == "compander":
        return default
    skew = 0.1 if kind == "skewed" else 0.0
    return replace(default, levels=tuple(normal_levels(depth, skew) for depth in range(1, 9)))


def quantized(
    depth: int, book: Codebook, make: Callable[..., CompandedTensor]
) -> tuple[np.ndarray, np.ndarray, CompandedTensor]:
    """Normal weights with log-normal column scales, their nearest levels, and the packed tensor."""
    rng = np.random.default_rng(depth)
    levels = book.levels[depth - 1]
    plain = {"means": False, "permuted": False, "row_scaled": False}
    base = make((ROWS, COLUMNS), seed=depth, group_size=64, **plain)
    scales = base.scales(book)[0].repeat(base.cluster_rows(), axis=0).astype(np.float64)
    weights = rng.standard_normal((ROWS, COLUMNS))
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, weights).astype(np.uint8)
    depths = np.full_like(base.depths, depth)
    tensor = replace(
        base, depths=depths, packed_codes=pack_codes(codes[None], depths, 64, base.partitions)
    )
    return weights * scales, levels[codes].astype(np.float64) * scales, tensor


def activations(kind: str, m: int) -> np.ndarray:
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, COLUMNS))
    if kind == "outliers":  # a few columns a hundred times the others, as trained models have
        x[:, rng.choice(COLUMNS, 8, replace=False)] *= 100
    return x.astype(np.float32)


@pytest.mark.parametrize("depth", range(1, 9))
@pytest.mark.parametrize("levels", ["compander", "fitted", "skewed"])
@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("m", [16, 64])  # inputs rounded per cluster, and many at once
def test_added_error(
    isa: str,
    depth: int,
    levels: str,
    kind: str,
    m: int,
    random_companded: Callable[..., CompandedTensor],
) -> None:
    """The kernel adds at most 5 % to the error power of the depth it reads."""
    book = codebook(levels)
    original, rounded, tensor = quantized(depth, book, random_companded)
    x = activations(kind, m)
    truth = x.astype(np.float64) @ rounded.T
    own = np.square(x.astype(np.float64) @ (original - rounded).T).mean()
    got = cpu.Matrix.from_tensor(tensor, book).matmul(x)
    assert np.square(got - truth).mean() <= 0.05 * own


@pytest.mark.parametrize("depth", range(1, 9))
@pytest.mark.parametrize("is_highest", [False, True])
def test_largest_sums_fit(
    isa: str,
    depth: int,
    is_highest: bool,
    random_companded: Callable[..., CompandedTensor],
) -> None:
    """Where all inputs are as large as the largest, and all levels, no sum of products overflows.

    Half a step of 84, at the coarsest, and half of 127 are within 1.5 %.
    """
    book = codebook("fitted")
    tensor = quantized(depth, book, random_companded)[2]
    codes = np.full((1, ROWS, COLUMNS), (2**depth - 1) * is_highest, np.uint8)
    tensor = replace(
        tensor,
        scale_codes=np.full_like(tensor.scale_codes, 40),
        packed_codes=pack_codes(codes, tensor.depths, 64, tensor.partitions),
    )
    x = np.ones((1, COLUMNS), np.float32)
    truth = x.astype(np.float64) @ dequantize(tensor, book).T.astype(np.float64)
    got = cpu.Matrix.from_tensor(tensor, book).matmul(x)
    np.testing.assert_allclose(got, truth, rtol=0.015)

"""What the tests of the CPU kernels share: instruction sets, a reference, and error bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from cvxq_format import Codebook, CompandedTensor, dequantize, unpack_codes
from cvxq_kernels import cpu

ISAS = ("scalar", "avx2", "avx512", "neon")
LEAST_STEPS = 84  # tables.c tries steps from largest / 84 down to largest / 127
ROUNDING = 2.0**-24  # of a float32


@pytest.fixture(autouse=True)
def built() -> None:
    if not cpu.is_available():
        pytest.skip(cpu.why_not())


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, forced; skipped where this machine lacks it."""
    if not cpu.force_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    cpu.force_isa("")


class Reference:
    """Products in float64 and how far the kernels may be from them."""

    def __init__(self, tensor: CompandedTensor, codebook: Codebook) -> None:
        self.weights = dequantize(tensor, codebook).astype(np.float64)  # (N, K)
        self._tensor = tensor
        self._levels = codebook.flat_levels().astype(np.float64)
        self._scales = tensor.scales(codebook)[0].astype(np.float64)  # (C, Kc)
        self._depths = tensor.depths[0].astype(int)
        self._tops = [1.0, *(float(np.abs(table).max()) for table in codebook.levels)]

    def product(self, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) @ self.weights.T + bias

    def exact_bound(self, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """A float32 sum of K products is off by at most K + 3 roundings of the magnitudes."""
        size = np.abs(x).astype(np.float64) @ np.abs(self.weights).T + np.abs(bias)
        mean = self._mean_size(x)
        return (x.shape[1] + 8) * ROUNDING * (size + mean) + 1e-37

    def fast_bound(self, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Half a step of the input on every level, half a step of the level on every input.

        The input's step is that of the largest scaled input of the cluster and depth, at most.
        """
        bound = self.exact_bound(x, bias)
        if self._tensor.transposed:
            return bound
        if len(x) > 16:  # inputs and weights as bfloat16, each off by 2⁻⁹ of itself at most
            size = np.abs(x).astype(np.float64) @ np.abs(self.weights).T
            bound += 1.01 * 2.0**-8 * (size + self._mean_size(x))
        tensor = self._tensor
        codes = unpack_codes(tensor, expert=0).astype(int)
        row = 0
        for cluster, height in enumerate(tensor.cluster_rows()):
            rows = tensor.stored_to_source()[row : row + height]
            scaled = np.abs(x * self._scales[cluster])  # (M, K)
            for depth in range(1, 9):
                columns = np.flatnonzero(self._depths[cluster] == depth)
                if not columns.size:
                    continue
                part = scaled[:, columns]
                level = np.abs(
                    self._levels[2**depth - 1 + codes[row : row + height][:, columns]]
                )  # (rows, columns)
                x_step = part.max(axis=1) / (127 if depth <= 4 else 32639)
                level_step = self._tops[depth] / (LEAST_STEPS if depth <= 4 else 32512)
                per_row = x_step[:, None] / 2 * (level.sum(axis=1) + columns.size * level_step)
                per_row = per_row + (part.sum(axis=1) * level_step / 2)[:, None]
                if depth > 4:  # low · low is left out: 127.5² of 32512 · 32639 at most, each
                    per_row = per_row + columns.size * x_step[:, None] * level_step * 128 * 128
                bound[:, rows] += per_row * 1.001
            row += height
        return bound

    def _mean_size(self, x: np.ndarray) -> np.ndarray:
        """Σ |x S t|: means and levels may cancel, their roundings do not."""
        tensor = self._tensor
        means = tensor.relative_means()
        if means is None:
            return np.zeros((len(x), tensor.shape[0]))
        size = np.abs(means[0].astype(np.float64)) * self._scales  # (C, Kc)
        spread = np.repeat(size, tensor.cluster_rows(), axis=0)  # stored rows
        stored = np.empty_like(spread)
        stored[tensor.stored_to_source()] = spread
        return np.abs(x) @ (stored if tensor.transposed else stored.T)


@pytest.fixture(scope="session")
def reference() -> Callable[[CompandedTensor, Codebook], Reference]:
    return Reference

"""What the tests of the CPU kernels share: instruction sets, a reference, and error bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from cvxq_format import Codebook, CompandedTensor, dequantize, unpack_codes
from cvxq_kernels import cpu

ISAS = ("scalar", "avx2", "avx512", "neon")
ROUNDING = 2.0**-24  # of a float32


@dataclass(frozen=True)
class Steps:
    """How finely an instruction set rounds at depths 1 … 8, at least.

    levels, inputs: steps to a table's largest level, and to a block's largest input. left_out: what
    the sums of products leave out, in steps of both per weight.
    """

    levels: tuple[float, ...]
    inputs: tuple[float, ...]
    left_out: tuple[float, ...]


# Products of both low bytes are left out: 127.5² at most, each.
BYTES = Steps((84,) * 4 + (32512,) * 4, (127,) * 4 + (32639,) * 4, (0,) * 4 + (128 * 128,) * 4)
# Two thirds of 127, 181 and 511 steps cover a table; four, or two, inputs fill 256, or 180, steps;
# one sum per block is rounded to whole steps.
NIBBLES = Steps(
    (42.5,) * 3 + (60.6, 171, 8191, 8191, 8191), (64,) * 3 + (90,) + (8191,) * 4, (0.5,) * 8
)


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
        used = range(5, self._depths.max(initial=0) + 1)
        self._is_symmetric = all(
            np.array_equal(codebook.levels[b - 1], -codebook.levels[b - 1][::-1]) for b in used
        )

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
        steps = NIBBLES if cpu.isa() == "avx2" and self._is_symmetric else BYTES
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
                x_step = part.max(axis=1) / steps.inputs[depth - 1]
                level_step = self._tops[depth] / steps.levels[depth - 1]
                per_row = x_step[:, None] / 2 * (level.sum(axis=1) + columns.size * level_step)
                per_row = per_row + (part.sum(axis=1) * level_step / 2)[:, None]
                left_out = steps.left_out[depth - 1] * level_step * columns.size
                per_row = per_row + x_step[:, None] * left_out
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

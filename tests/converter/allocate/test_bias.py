"""Bias correction: the mean output error is gone, and a new bias comes only where it pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.bias import BIAS_BITS, gained_bias_pays, output_shift
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.quantize.correction import to_16_bits


def statistics(mean: np.ndarray | None, second: np.ndarray | None) -> MatrixStatistics:
    """Statistics of a matrix with these moments of its input; the rest does not matter here."""
    ones = np.ones(3)
    evidence = np.ones(3, dtype=np.int64)
    moments = [None if m is None else m.astype(np.float32) for m in (mean, second)]
    return MatrixStatistics(ones, ones, evidence, evidence, moments[0], moments[1], 1)


def test_the_shift_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    quantized = torch.tensor([[1.5, 2.0], [0.0, -2.0]])
    shift = output_shift(weight, quantized, np.array([4.0, 3.0], np.float32))
    assert shift.tolist() == [2.0, -3.0]


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_output_of_a_batch_comes_back(seed: int) -> None:
    """Up to the rounding of the bias to 16 bits, as float64 arithmetic sees it."""
    rng = np.random.default_rng(seed)
    batch = rng.normal(0.3, 1, (50, 24))
    weight = rng.normal(0, 0.5, (16, 24))
    quantized = np.round(weight * 4) / 4
    bias = rng.normal(0, 1, 16).astype(np.float16).astype(np.float64)
    mean = batch.mean(0).astype(np.float32)
    shift = output_shift(torch.from_numpy(weight), torch.from_numpy(quantized), mean)
    corrected = to_16_bits(torch.from_numpy(bias).float() - shift).double().numpy()
    before = (batch @ quantized.T + bias - (batch @ weight.T + bias)).mean(0)
    after = (batch @ quantized.T + corrected - (batch @ weight.T + bias)).mean(0)
    assert np.abs(before).max() > 0.05
    rounding = 2.0**-11 * np.abs(bias - before) + 1e-6  # half a unit of float16, and float32 sums
    assert (np.abs(after) <= rounding).all()


def test_biases_too_large_for_float16_become_bfloat16() -> None:
    assert to_16_bits(torch.tensor([1.0, 70000.0])).tolist() == [1.0, 70144.0]
    assert to_16_bits(torch.tensor([1.0009765625])).tolist() == [1.0009765625]


def test_a_new_bias_pays_where_the_mean_carries_the_input() -> None:
    columns = 64
    centred = statistics(np.full(columns, 0.01), np.ones(columns))
    shifted = statistics(np.full(columns, 0.8), np.ones(columns))
    assert not gained_bias_pays(centred)
    assert gained_bias_pays(shifted)
    # ½ log2(1 / (1 − ρ)) = 16 / K at ρ = 1 − 2^(−32/K)
    border = 1 - 2 ** (-2 * BIAS_BITS / columns)
    for share, expected in ((border * 0.98, False), (border * 1.02, True)):
        mean = np.full(columns, np.sqrt(share))
        assert gained_bias_pays(statistics(mean, np.ones(columns))) == expected


def test_a_wide_matrix_gains_a_bias_sooner_than_a_narrow_one() -> None:
    for columns, expected in ((32, False), (1024, True)):
        assert gained_bias_pays(statistics(np.full(columns, 0.3), np.ones(columns))) == expected


def test_inputs_that_are_always_zero_do_not_count() -> None:
    mean, second = np.array([0.9, 0.0] * 32), np.array([1.0, 0.0] * 32)
    assert gained_bias_pays(statistics(mean, second))
    assert not gained_bias_pays(statistics(np.zeros(8), np.zeros(8)))
    assert not gained_bias_pays(statistics(None, None))


def test_an_input_that_never_varies_pays_without_dividing_by_zero() -> None:
    assert gained_bias_pays(statistics(np.ones(64), np.ones(64)))

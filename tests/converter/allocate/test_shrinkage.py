"""Sensitivities of rows with little evidence or none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.plan import Sensitivity
from cvxq_converter.allocate.shrinkage import UNKNOWN, shrink
from cvxq_converter.measure.statistics import measure_statistics
from cvxq_converter.source.checkpoint import find_matrices
from hypothesis import given
from hypothesis import strategies as st


def log_mean(values: np.ndarray) -> float:
    return float(np.log(values).mean())


def test_rows_without_evidence_get_the_prior_mean() -> None:
    shrunk = shrink(np.array([0.0, 1.0, 4.0, 16.0, 0.0]), np.array([0, 8, 8, 8, 0]), 8)
    np.testing.assert_allclose(shrunk[[0, 4]], 4.0)
    assert shrunk[1] < shrunk[2] < shrunk[3]


def test_a_gradient_without_evidence_is_not_believed() -> None:
    """A head's row whose token was never drawn has a tiny gradient, and no evidence."""
    shrunk = shrink(np.array([1e-18, 1.0, 4.0, 16.0]), np.array([0, 8, 8, 8]), 8)
    assert shrunk[0] == pytest.approx(4.0)


def test_more_evidence_means_less_shrinking() -> None:
    values = np.array([16.0, 16.0, 16.0, 1.0, 1.0, 1.0])
    shrunk = shrink(values, np.array([1, 8, 64, 1, 8, 64]), 64)
    assert shrunk[0] < shrunk[1] < shrunk[2] < 16
    assert shrunk[3] > shrunk[4] > shrunk[5] > 1


def test_differences_within_the_noise_vanish() -> None:
    """One sequence's noise explains this spread, so nothing is left of it; many keep theirs."""
    values = np.exp(np.random.default_rng(0).normal(size=500))
    once = np.log(shrink(values, np.ones(500, dtype=np.int64), 100))
    often = np.log(shrink(values, np.full(500, 100), 100))
    assert once.std() < 0.3
    assert often.std() == pytest.approx(np.log(values).std(), rel=0.03)


def test_the_estimate_beats_both_the_raw_one_and_the_prior() -> None:
    random = np.random.default_rng(1)
    truth = random.normal(scale=1.5, size=2000)
    evidence = random.integers(1, 9, 2000)
    seen = truth + random.normal(size=2000) / np.sqrt(evidence)
    found = np.log(shrink(np.exp(seen), evidence, 8))
    error = np.mean((found - truth) ** 2)
    assert error < 0.92 * np.mean((seen - truth) ** 2)
    assert error < 0.5 * np.var(truth)


def test_nothing_felt_at_all() -> None:
    np.testing.assert_array_equal(shrink(np.zeros(3), np.zeros(3, dtype=np.int64), 9), UNKNOWN)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e30), st.integers(0, 20)),
        min_size=1,
        max_size=30,
    ),
    st.floats(1e-6, 1e6),
)
def test_results_are_positive_between_the_extremes_and_scale_with_the_input(
    rows: list[tuple[float, int]], factor: float
) -> None:
    values = np.array([value for value, _ in rows])
    values[values < 1e-200] = 0
    evidence = np.array([count for _, count in rows])
    shrunk = shrink(values, evidence, 20)
    assert (shrunk > 0).all()
    known = values[(evidence > 0) & (values > 0)]
    if len(known):
        assert known.min() * (1 - 1e-9) <= shrunk.min()
        assert shrunk.max() <= known.max() * (1 + 1e-9)
        np.testing.assert_allclose(
            shrink(values * factor, evidence, 20), shrunk * factor, rtol=1e-6
        )


def test_a_token_that_is_never_expected_keeps_its_depth_within_three_bits(
    build_network: Any,
) -> None:
    """As input and as output: depth is ½ log2 of the sensitivity, up to a common constant."""
    network = build_network("phi")
    with torch.no_grad():
        network.lm_head.bias[60:] = -30  # tokens from 60 on are never predicted …
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(3, 60, (16, 24), generator=generator)  # … nor ever read
    found = measure_statistics(network, find_matrices(network), sequences, "kl", 0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        row = Sensitivity.from_statistics(found[name], rows_are_tokens=True).row
        lost = 0.5 * np.log2(row[3:60].mean() / row[60:])
        assert (lost > 2).all()
        assert (lost < 3.5).all()
        raw = found[name].row_sensitivity
        assert 0.5 * np.log2(raw[60:].max() / raw[:60].mean()) < -8

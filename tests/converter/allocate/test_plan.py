"""Statistics and weights → what bits are worth, up to tokens that calibration never saw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.clustering import Clustering
from cvxq_converter.allocate.plan import MatrixPlan, Sensitivity, group_worth, plan_matrix
from cvxq_converter.allocate.sizes import allocate_for_rate
from cvxq_converter.measure.statistics import measure_statistics
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.options import Method
from cvxq_converter.source.matrices import Matrix, find_matrices


def plan_of(
    weight: torch.Tensor, sensitivity: Sensitivity, tokens: bool = False, **options: Any
) -> MatrixPlan:
    matrix = SimpleNamespace(
        name="m", weight=weight, source_orientation="out_in", rows_are_tokens=tokens
    )
    chosen = {"group_size": 2, "partitions": 1, "separable_depths": False, "means": False}
    method = Method(**{**chosen, "largest_error": 1.0, **options})
    return plan_matrix(cast(Matrix, matrix), weight, sensitivity, method)


def test_worth_by_hand() -> None:
    """½ log2 of variance × row sensitivity (mean of the cluster) × column sensitivity."""
    clustering = Clustering(np.array([1, 0, 2, 3]), np.array([0, 2, 4]), 2, 1)
    sensitivity = Sensitivity(np.array([1.0, 3.0, 8.0, 8.0]), np.array([1.0, 4.0]))
    variance = np.array([[2.0, 8.0], [0.0, 0.5]])
    worth = group_worth(variance, sensitivity, clustering)
    assert worth.tolist() == [[1.0, 3.0], [-np.inf, 2.0]]


def test_the_plan_of_a_matrix_by_hand() -> None:
    weight = torch.tensor([[8.0, 4.0], [1.0, -1.0], [-8.0, 4.0], [1.0, 1.0]])
    plan = plan_of(weight, Sensitivity(np.ones(4), np.array([1.0, 16.0])))
    assert plan.clustering.permutation.tolist() == [1, 3, 0, 2]
    assert plan.moments[1].tolist() == [[1.0, 1.0], [64.0, 16.0]]
    assert (plan.worths.units() / 256).tolist() == [[0.0, 2.0], [3.0, 4.0]]
    assert plan.deviation().tolist() == [[1.0, 1.0], [8.0, 4.0]]
    uniform = plan_of(weight, Sensitivity(np.ones(4), np.array([1.0, 16.0])), uniform_depths=True)
    assert np.ptp(uniform.worths.units()) == 0


def test_means_are_stored_only_where_allowed_and_worth_it() -> None:
    rng = torch.Generator().manual_seed(0)
    centred = torch.randn(32, 6, generator=rng)
    for weight, allowed, expected in [
        (centred + 5, True, True),
        (centred + 5, False, False),
        (centred, True, False),
    ]:
        plan = plan_of(weight, Sensitivity.uniform(32, 6), means=allowed, group_size=16)
        assert plan.with_means == expected
        spread = float(plan.deviation().mean())
        assert spread == pytest.approx(
            5.1 if weight is not centred and not expected else 1, rel=0.2
        )


@pytest.mark.parametrize("tokens", [False, True])
def test_rows_that_are_worth_the_same_are_scaled(tokens: bool) -> None:
    sizes = torch.logspace(0, 3, 64, base=2)[torch.randperm(64, generator=torch.Generator())]
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * sizes[:, None]
    sensitivity = Sensitivity(1 / sizes.numpy() ** 2, np.ones(128))
    assert plan_of(weight, sensitivity, tokens=tokens, group_size=16).row_scales.bits > 0


def test_tokens_that_are_rare_in_calibration_may_not_be_elsewhere() -> None:
    """Their rows' sensitivities are drawn together, to the same total."""
    row = np.array([1e-9, 1e-2, 1.0, 1.0])
    stats = MatrixStatistics(
        row_sensitivity=row,
        column_sensitivity=np.full(2, row.sum() / 2),
        row_evidence=np.full(4, 10**9),
        column_evidence=np.full(2, 10**9),
        input_mean=None,
        input_second_moment=None,
        sequences=10**9,
    )
    found = Sensitivity.from_statistics(stats, rows_are_tokens=True)
    np.testing.assert_allclose(found.row / found.row[2], [2.1 / 4 / 64, 1e-1, 1, 1], rtol=1e-3)
    assert found.row.sum() * found.column.sum() == pytest.approx(row.sum())
    plain = Sensitivity.from_statistics(stats)
    np.testing.assert_allclose(plain.row / plain.row[2], row, rtol=1e-5)


def test_sensitivities_keep_the_total_that_was_measured() -> None:
    rng = np.random.default_rng(0)
    row, column = rng.exponential(1, 30), rng.exponential(1, 20)
    stats = MatrixStatistics(
        row_sensitivity=row,
        column_sensitivity=column * row.sum() / column.sum(),
        row_evidence=rng.integers(0, 8, 30),
        column_evidence=np.full(20, 8),
        input_mean=None,
        input_second_moment=None,
        sequences=8,
    )
    found = Sensitivity.from_statistics(stats)
    assert np.outer(found.row, found.column).sum() == pytest.approx(row.sum())
    assert (found.row > 0).all()
    assert (found.column > 0).all()


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@pytest.mark.parametrize("separable", [True, False])
def test_tokens_that_calibration_never_saw_keep_their_depth(
    architecture: str, separable: bool, build_network: Any
) -> None:
    """Mean depth within one bit of the tokens that were seen, as input and as output."""
    network = build_network(architecture)
    matrices = find_matrices(network)
    sequences = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    statistics = measure_statistics(network, matrices, sequences, "kl", seed=0)
    method = Method(
        group_size=4, partitions=1, separable_depths=separable, means=False, largest_error=1.0
    )
    plans = [
        plan_matrix(
            matrix,
            matrix.weight,
            Sensitivity.from_statistics(statistics[matrix.name]),
            method,
        )
        for matrix in matrices
    ]
    weights = sum(m.weight.numel() for m in matrices)
    found = allocate_for_rate([p.worths for p in plans], 3.0, weights, 0)
    checked = 0
    for plan, depths in zip(plans, found.depths, strict=True):
        if plan.matrix.name not in ("model.embed_tokens.weight", "lm_head.weight"):
            continue
        checked += 1
        seen = np.isin(np.arange(96), sequences.numpy())
        assert seen.any()
        assert (~seen).sum() > 10
        depth = depths.mean(axis=1)[plan.clustering.cluster_of_row()]
        assert abs(depth[~seen].mean() - depth[seen].mean()) <= 1.0
        assert depth[~seen].mean() > 1.0  # not pruned
    assert checked == (1 if architecture == "llama-tied" else 2)

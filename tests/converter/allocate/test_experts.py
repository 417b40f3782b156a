"""Experts that calibration hardly came to keep bits: their pool vouches for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from cvxq_converter.allocate.experts import LEAST_SHARE, pool_experts
from cvxq_converter.allocate.plan import make_plans
from cvxq_converter.allocate.sizes import allocate_for_rate
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.options import Method
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.scratch import Scratch

N, K, LENGTH = 32, 48, 64


def statistics_of(tokens: int, felt: float, generator: np.random.Generator) -> MatrixStatistics:
    """Of an expert that `tokens` of 4 · 64 came to, each as important as `felt`."""
    rows = felt * tokens * generator.lognormal(0, 0.3, N)
    columns = generator.lognormal(0, 0.3, K)
    seen = min(tokens, 4)
    return MatrixStatistics(
        row_sensitivity=rows,
        column_sensitivity=columns * rows.sum() / columns.sum(),
        row_evidence=np.full(N, seen),
        column_evidence=np.full(K, seen),
        input_mean=None,
        input_second_moment=None,
        sequences=4,
        token_weights=np.zeros((4, LENGTH), np.float32),
        routed_tokens=np.array([tokens, 0, 0, 0]),
    )


def model_of(counts: list[int], felt: float = 1e-3) -> tuple[Any, dict[str, MatrixStatistics]]:
    """Experts of one pool, and beside them a matrix that belongs to none."""
    generator = np.random.default_rng(0)
    names = [*(f"expert {i}" for i in range(len(counts))), "other"]
    weights = {
        name: torch.randn(N, K, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(names)
    }
    matrices = [
        SimpleNamespace(
            name=name,
            weight=weights[name],
            source_orientation="out_in",
            rows_are_tokens=False,
            pool=None if name == "other" else "pool",
        )
        for name in names
    ]
    statistics = {
        name: statistics_of(count, felt, generator)
        for name, count in zip(names, [*counts, 256], strict=True)
    }
    streamed = SimpleNamespace(scratch=Scratch())
    return SimpleNamespace(matrices=matrices, originals=weights, streamed=streamed), statistics


def mean_depths(counts: list[int]) -> list[float]:
    loaded, statistics = model_of(counts)
    method = Method(group_size=16, partitions=1)
    plans = make_plans(cast(LoadedModel, loaded), statistics, method)
    weights = N * K * len(plans)
    allocation = allocate_for_rate([plan.worths for plan in plans], 3.0, weights, 0)
    return [float(depths.mean()) for depths in allocation.depths]


def test_an_unseen_expert_keeps_a_mean_depth_within_one_bit_of_its_pool() -> None:
    *experts, _ = mean_depths([64, 64, 60, 68, 0, 1])
    pool = np.mean(experts[:4])
    assert pool > 2
    assert abs(experts[4] - pool) < 1
    assert abs(experts[5] - pool) < 1


def test_an_expert_that_more_tokens_come_to_is_worth_more() -> None:
    *experts, _ = mean_depths([200, 40, 40, 40])
    assert experts[0] > max(experts[1:]) + 0.2


def test_pooling_by_hand() -> None:
    loaded, statistics = model_of([96, 96, 0])
    pooled = pool_experts(loaded.matrices, statistics)
    assert pooled["other"] is statistics["other"]
    seen, unseen = pooled["expert 0"], pooled["expert 2"]
    np.testing.assert_allclose(
        seen.row_sensitivity.sum(), statistics["expert 0"].row_sensitivity.sum(), rtol=0.02
    )
    share = unseen.row_sensitivity.sum() / seen.row_sensitivity.sum()
    np.testing.assert_allclose(share, LEAST_SHARE * 64 / 96, rtol=0.02)
    shape = sum(statistics[f"expert {i}"].column_sensitivity for i in (0, 1))
    np.testing.assert_allclose(
        unseen.column_sensitivity / unseen.column_sensitivity.sum(), shape / shape.sum()
    )
    assert unseen.row_evidence.min() == 1


def test_a_pool_that_nothing_came_to_stays_unknown() -> None:
    loaded, statistics = model_of([0, 0])
    pooled = pool_experts(loaded.matrices, statistics)
    assert not pooled["expert 1"].row_sensitivity.any()

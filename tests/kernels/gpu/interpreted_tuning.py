"""Choosing plans: what is kept, what is refused, what is remembered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cvxq_kernels import PackedWeight
from cvxq_kernels.gpu import GpuWeight, tuning
from cvxq_kernels.gpu.plan import Plan, bucket, choose_plan

Make = Callable[..., PackedWeight]

PLANS = (Plan("expand"), Plan("matvec", 1, 2), Plan("gemm", 1, 1, 16))


@pytest.fixture
def weight(
    make: Make, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> GpuWeight:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "candidates", lambda *_: iter(PLANS))
    return GpuWeight.from_packed(make((16, 12), 5), device)


def seconds(*times: float) -> tuning.Timer:
    """Timer that answers `times` in turn and runs nothing."""
    left = iter(times)
    return lambda action: next(left)


def test_the_fastest_is_kept_and_remembered(weight: GpuWeight, tmp_path: Path) -> None:
    assert not tuning.is_known(weight, [1], torch.float32)
    found = tuning.tune(weight, [1], torch.float32, seconds(3, 1, 2))
    assert tuning.is_known(weight, [1], torch.float32)
    assert found == {1: PLANS[1]}
    assert weight.plan_for(1) == PLANS[1]
    weight.plans.clear()
    assert tuning.tune(weight, [1], torch.float32, seconds()) == found  # measures nothing
    path = tuning.cache_path(weight.device)
    assert path.is_relative_to(tmp_path)
    path.write_text("{")
    assert tuning.tune(weight, [1], torch.float32, seconds(1, 2, 3)) == {1: PLANS[0]}


def test_a_plan_with_wrong_values_is_never_kept(
    weight: GpuWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = GpuWeight.matmul

    def broken(self: GpuWeight, x: torch.Tensor, **options: object) -> torch.Tensor:
        y = honest(self, x, **options)  # type: ignore[arg-type]
        plan = options["plan"]
        if plan == PLANS[1]:
            y[0, 3] += y.abs().max()
        elif plan == PLANS[2]:
            y[0, 5] = float("nan")
        return y

    monkeypatch.setattr(GpuWeight, "matmul", broken)
    assert tuning.tune(weight, [1], torch.float32, seconds(3)) == {1: PLANS[0]}


def test_candidates_fit_the_batch() -> None:
    for batch in (1, 8, 16, 64, 256):
        plans = list(tuning.candidates(batch, 132))
        assert len(plans) == len(set(plans))
        assert ("gemm" in {plan.kind for plan in plans}) == (batch > 1)
        assert ("expand" in {plan.kind for plan in plans}) == (batch >= 16)
        assert ("matvec" in {plan.kind for plan in plans}) == (batch <= 4)


@pytest.mark.parametrize(
    ("batch", "kind"), [(1, "matvec"), (8, "gemm"), (64, "gemm"), (65, "expand")]
)
def test_guesses(batch: int, kind: str) -> None:
    plan = choose_plan(batch, 132)
    assert plan.kind == kind
    assert plan.programs >= 132 or kind == "expand"


def test_batches_share_a_power_of_two() -> None:
    assert [bucket(batch) for batch in (1, 2, 3, 8, 9, 256)] == [1, 2, 4, 8, 16, 256]

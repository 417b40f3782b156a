"""The search for the smallest rate that meets a target, on losses made up for the purpose."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from cvxq_converter.allocate.target import TOLERANCE, LossTarget, search_rate
from cvxq_converter.errors import ConversionError, RateError
from cvxq_converter.measure.curve import Curve, Point, Trial
from cvxq_converter.options import ConversionOptions
from hypothesis import given, settings
from hypothesis import strategies as st

RATES = [0.2, *np.arange(0.25, 8.01, 0.25).tolist()]
Loss = Callable[[float], float]


def curve(slope: float = 2.0, level: float = 4.0) -> Curve:
    """A loss of `level` · 2^(−slope · rate)."""
    return Curve(tuple(Point(r, int(1000 * r), level * 2 ** (-slope * r)) for r in RATES))


def search(asked: float, loss: Loss, predicted: Curve) -> tuple[Trial, tuple[Trial, ...]]:
    return search_rate(LossTarget("--max-kl", asked), predicted, loss)


@settings(max_examples=200, deadline=None)
@given(
    asked=st.floats(-4.0, 0.0).map(lambda e: 10**e),
    slope=st.floats(1.2, 2.4),
    level=st.floats(0.5, 30.0),
    bend=st.floats(0.0, 0.8),
    noise=st.floats(0.0, 0.012),
    phase=st.floats(0.0, 6.0),
)
def test_the_target_is_met_within_the_tolerance(
    asked: float, slope: float, level: float, bend: float, noise: float, phase: float
) -> None:
    """Whatever the prediction is worth: other slopes, levels, bends, and noise of a percent."""

    def loss(rate: float) -> float:
        ripple = 1 + noise * math.sin(40 * rate + phase)
        return level * 2 ** (-slope * rate) * (1 + bend * math.exp(-rate)) * ripple

    if not loss(8.0) <= asked * (1 - TOLERANCE) <= asked <= loss(0.2):
        return  # beyond the ends, see below
    best, trials = search(asked, loss, curve())
    assert (1 - TOLERANCE) * asked <= best.achieved <= asked
    assert best.achieved == loss(best.rate_bits_per_weight)
    assert best in trials
    assert len(trials) <= 12


def test_a_good_prediction_needs_one_trial_and_a_wrong_level_two() -> None:
    good, bad = curve(), curve(level=1.0)
    loss: Loss = lambda rate: 4 * 2 ** (-2 * rate)  # noqa: E731
    assert len(search(0.05, loss, good)[1]) == 1
    assert len(search(0.05, loss, bad)[1]) == 2


def test_a_staircase_ends_at_its_step() -> None:
    """Where no rate gives a loss within the tolerance, the smallest one that is good enough."""
    best, trials = search(0.05, lambda rate: 0.5 if rate < math.pi else 0.001, curve())
    assert best.achieved == 0.001
    assert math.pi <= best.rate_bits_per_weight <= math.pi + 1e-3
    assert len(trials) < 40


def test_a_target_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    message = r"^--max-kl 1e-07: even at 8 bits per weight there is a KL of 0.0123 nats .* or more$"
    with pytest.raises(RateError, match=message):
        search(1e-7, lambda rate: max(0.0123, 4 * 2 ** (-2 * rate)), curve())
    with pytest.raises(RateError, match=r"even at 8 bits .* a perplexity 1\.2300% higher; ask"):
        search_rate(LossTarget("--max-perplexity-increase", 1e-7), curve(), lambda rate: 0.0123)


def test_a_target_that_everything_meets_gives_the_lowest_rate() -> None:
    best, _ = search(100.0, lambda rate: 4 * 2 ** (-2 * rate), curve())
    assert best.rate_bits_per_weight == 0.2


def test_losses_below_zero_are_good_enough() -> None:
    """On a text a quantized model may be better by chance."""
    best, _ = search(0.001, lambda rate: -0.01 if rate > 3.3 else 0.1, curve())
    assert best.achieved == -0.01
    assert best.rate_bits_per_weight == pytest.approx(3.3, abs=1e-3)


def test_trials_correct_the_curve() -> None:
    corrected = curve().with_trials([Trial(3.0, 0.25), Trial(2.0, 0.5)])
    assert [t.rate_bits_per_weight for t in corrected.trials] == [2.0, 3.0]
    found = corrected.loss_at([1.0, 2.0, 2.5, 3.0, 4.0])
    # ×2 at 2 bits and below, ×4 at 3 bits and above, the geometric mean half way
    assert found == pytest.approx([2.0, 0.5, 2 ** (2 - 5 + 1.5), 0.25, 4 * 4 * 2.0**-8])
    rate = corrected.rate_for(0.25)
    assert rate == pytest.approx(3.0, abs=1 / 128)
    assert corrected.loss_at([rate])[0] <= 0.25
    assert corrected.rate_for(1e-12) == 8.0
    assert Curve.from_json(corrected.to_json()) == corrected


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_limits_that_are_none(value: float) -> None:
    with pytest.raises(ConversionError, match=r"a largest loss of .*, allowed are numbers above 0"):
        ConversionOptions.of(max_kl=value)


def test_options_with_no_or_two_targets_or_nothing_to_judge_by() -> None:
    for given_targets in ({}, {"bits": 3.0, "max_kl": 0.1}, {"size_bytes": 9, "bits": 3.0}):
        with pytest.raises(ConversionError, match="exactly one of bits, a size in bytes, a larg"):
            ConversionOptions.of(**given_targets)
    for other in ({"calibration": "none"}, {"method": "rtn"}, {"iterations": 2}):
        with pytest.raises(ConversionError, match=r"needs calibration, --method cvxq and a single"):
            ConversionOptions.of(max_perplexity_increase=0.01, **other)

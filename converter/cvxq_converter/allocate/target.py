"""The smallest rate whose loss is within what was asked for, by trial quantizations.

The loss falls with the rate, but for noise of a percent or two, and it is nearly exponential in
it. So the predicted curve, corrected by the trials so far, names the next rate to try, and a
bracket of a rate known to lose too much and one known to be good enough is halved whenever that
does not close in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cvxq_converter.errors import RateError
from cvxq_converter.measure.curve import Curve, Trial

TOLERANCE = 0.05  # a result may be better than asked for by this share
AIM = 1 - TOLERANCE / 2
RESOLUTION = 1 / 1024  # bits per weight; a closer bracket decides nothing any more
LEAST_MOVE = 1 / 64  # bits per weight, beyond a rate whose side of the target is known
PATIENCE = 4  # trials on one side of the target before the other end is approached by halves


@dataclass(frozen=True)
class LossTarget:
    """A loss asked for by name: the option, the limit, and how figures of it are written."""

    option: str
    asked: float

    def text(self, value: float) -> str:
        """A value of this loss, for people."""
        if self.option == "--max-perplexity-increase":
            return f"a perplexity {value:.4%} higher"
        return f"a KL of {value:.3g} nats per token"


@dataclass(frozen=True)
class TargetResult:
    """What was asked for and what was achieved, on sequences that chose nothing else."""

    option: str
    asked: float
    achieved: float
    trials: int


def search_rate(
    target: LossTarget, curve: Curve, attempt: Callable[[float], float]
) -> tuple[Trial, tuple[Trial, ...]]:
    """Find the trial of the smallest rate that meets the target; returns it and all trials.

    attempt: quantizes at a rate in bits per weight and returns the loss. The search ends when the
    loss is within `TOLERANCE` of the limit, or when no rate in between is left.
    Raises RateError, saying what can be reached, when the highest rate of the curve fails.
    """
    bracket = Bracket(curve.lowest_rate, curve.highest_rate)
    trials: list[Trial] = []
    while not bracket.is_closed:
        guess = curve.with_trials(trials).rate_for(AIM * target.asked)
        rate = bracket.admit(guess, len(trials))
        trial = Trial(rate, attempt(rate))
        trials.append(trial)
        bracket = bracket.with_trial(trial, target.asked)
        if bracket.met is trial:
            if trial.achieved >= (1 - TOLERANCE) * target.asked or rate <= curve.lowest_rate:
                break
        elif rate >= curve.highest_rate:
            raise RateError(
                f"{target.option} {target.asked:g}: even at {rate:g} bits per weight there is "
                f"{target.text(trial.achieved)}; ask for that much or more"
            )
    assert bracket.met is not None
    return bracket.met, tuple(trials)


@dataclass(frozen=True)
class Bracket:
    """Rates between which the answer lies, and the trials that say so.

    is_closing: whether the last trial, inside of two others, at least halved the bracket.
    """

    low: float
    high: float
    failed: Trial | None = None
    met: Trial | None = None
    is_closing: bool = True

    @property
    def is_closed(self) -> bool:
        """Whether the smallest rate that meets the target is known."""
        return self.met is not None and self.high - self.low <= RESOLUTION

    def with_trial(self, trial: Trial, asked: float) -> Bracket:
        """The bracket once a rate inside of it was tried."""
        rate = trial.rate_bits_per_weight
        if trial.achieved <= asked:
            after = replace(self, high=rate, met=trial)
        else:
            after = replace(self, low=rate, failed=trial)
        halved = after.high - after.low <= (self.high - self.low) / 2
        return replace(after, is_closing=halved or self.met is None or self.failed is None)

    def admit(self, guess: float, trials: int) -> float:
        """The rate to try when the curve says `guess`, after some trials."""
        middle = (self.low + self.high) / 2
        if self.met is not None and self.failed is not None:
            margin = (self.high - self.low) / 16
            inside = min(max(guess, self.low + margin), self.high - margin)
            return inside if self.is_closing else middle
        is_near = self.high - self.low < 16 * LEAST_MOVE
        if self.failed is not None:
            rate = min(max(guess, self.low + LEAST_MOVE), self.high)
            return rate if trials < PATIENCE else self.high if is_near else max(rate, middle)
        if self.met is not None:
            rate = max(min(guess, self.high - LEAST_MOVE), self.low)
            return rate if trials < PATIENCE else self.low if is_near else min(rate, middle)
        return guess

"""Rate, size and loss of a model that is not converted yet: a curve, and trials that correct it.

The sensitivities foretell ½ Σ P_n G_n² S_n² d(B_n), the loss of errors so small that the output
follows them linearly. Real losses differ, more so at low rates, by a factor that changes slowly
with the rate. So every trial, a quantization whose loss was measured, corrects the curve by its
own factor: linearly in the logarithm between two trials, by the nearer one's beyond them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

FINENESS = 1 / 256  # bits per weight between the rates that `rate_for` considers
SMALLEST_LOSS = 1e-12  # nats; a loss below it (or below zero, by chance) counts as this


@dataclass(frozen=True)
class Point:
    """One rate of the curve: bits per weight all-in, bytes of the file, uncorrected loss."""

    rate_bits_per_weight: float
    file_bytes: int
    predicted: float


@dataclass(frozen=True)
class Trial:
    """A quantization at some rate, and the loss that it was found to have."""

    rate_bits_per_weight: float
    achieved: float


@dataclass(frozen=True)
class Curve:
    """Points by rising rate, and the trials so far by rising rate.

    The loss is KL in nats per token where the model was measured, else the share of the weights'
    energy that is lost.
    """

    points: tuple[Point, ...]
    trials: tuple[Trial, ...] = ()

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Curve:
        """The curve that `to_json` described; raises TypeError or KeyError for anything else."""
        return cls(
            tuple(Point(**point) for point in record["points"]),
            tuple(Trial(**trial) for trial in record["trials"]),
        )

    def to_json(self) -> dict[str, Any]:
        """The curve as JSON values."""
        return asdict(self)

    @property
    def lowest_rate(self) -> float:
        """The rate at which every weight is pruned, or nearly so."""
        return self.points[0].rate_bits_per_weight

    @property
    def highest_rate(self) -> float:
        """The largest rate of the curve."""
        return self.points[-1].rate_bits_per_weight

    def with_trials(self, trials: Sequence[Trial]) -> Curve:
        """The curve corrected by these trials instead."""
        return replace(self, trials=tuple(sorted(trials, key=lambda t: t.rate_bits_per_weight)))

    def loss_at(self, rates: Sequence[float] | np.ndarray) -> np.ndarray:
        """Expected loss (n,) at `rates` (n,)."""
        known = np.array([p.rate_bits_per_weight for p in self.points])
        logs = np.log([max(p.predicted, SMALLEST_LOSS) for p in self.points])
        expected = np.interp(rates, known, logs)
        if self.trials:
            at = np.array([t.rate_bits_per_weight for t in self.trials])
            found = np.log([max(t.achieved, SMALLEST_LOSS) for t in self.trials])
            expected = expected + np.interp(rates, at, found - np.interp(at, known, logs))
        return np.exp(expected)

    def rate_for(self, loss: float) -> float:
        """The smallest rate at which at most `loss` is expected; the highest if there is none."""
        steps = int(np.ceil((self.highest_rate - self.lowest_rate) / FINENESS))
        rates = np.linspace(self.lowest_rate, self.highest_rate, steps + 1)
        enough = np.flatnonzero(self.loss_at(rates) <= loss)
        return float(rates[enough[0]]) if len(enough) else self.highest_rate

    def file_bytes_at(self, rate: float) -> int:
        """Bytes of the whole file at a rate."""
        known = [p.rate_bits_per_weight for p in self.points]
        return round(float(np.interp(rate, known, [p.file_bytes for p in self.points])))

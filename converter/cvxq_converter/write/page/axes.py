"""Axes of the page's charts: values → pixels, and ticks at round numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """Where a tick is, in pixels, and what it says."""

    position: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A range of values laid on a range of pixels, linearly or by the logarithm.

    A y axis runs from its larger pixel (the bottom) to its smaller one.
    """

    low: float
    high: float
    first_pixel: float
    last_pixel: float
    is_logarithmic: bool = False
    unit: str = ""  # behind every tick's value

    def at(self, value: float) -> float:
        """Pixel of a value, to a tenth; values beyond the range lie at its ends."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.first_pixel + share * (self.last_pixel - self.first_pixel), 1)

    def ticks(self) -> list[Tick]:
        """About five ticks at round values; powers of ten on a logarithmic axis."""
        if self.is_logarithmic:
            values = _powers(self.low, self.high)
            return [Tick(self.at(v), _power_label(v)) for v in values]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [
            Tick(self.at(i * step), f"{i * step:.{digits}f}".replace("-", "−") + self.unit)
            for i in range(first, last + 1)
        ]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.is_logarithmic else value


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 × 10^n that is no less than `least`."""
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten in the range; with 2 and 5 times them where they would be few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    powers = [10.0**e for e in exponents if low <= 10.0**e * 1.0001 and 10.0**e <= high * 1.0001]
    if len(powers) > 2:
        return powers
    fine = [f * 10.0**e for e in exponents for f in (1, 2, 5)]
    return [v for v in fine if low <= v * 1.0001 and v <= high * 1.0001]


def _power_label(value: float) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10.0**exponent)
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if factor == 1 else f"{factor}·{power}"

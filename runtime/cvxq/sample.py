"""From logits to the next token: penalties, constraint, temperature, truncation, draw.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.  What is
added to logits (presence and frequency penalties, biases) is added after the repetition penalty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cvxq.errors import ArgumentError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen and when to stop; the defaults sample the model as it is.

    temperature: 0 chooses the likeliest token; top_k: 0 keeps all; top_p: 1 keeps all; min_p:
    least probability as a share of the likeliest token's, 0 keeps all; repetition_penalty: > 1
    lowers tokens that occurred; presence_penalty: taken off the logits of tokens drawn before;
    frequency_penalty: the same for each time; logit_bias: (token, what is added to its logit);
    seed: None draws differently each time; max_tokens: None goes on to the end of the text or of
    the context; stop: strings that end the text and are not shown.
    Raises ArgumentError for a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "any number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "any number"),
            ("logit_bias", self._has_biases(), "finite numbers for tokens from 0 on"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "0 to 2^63 − 1"),
            ("max_tokens", self.max_tokens is None or self.max_tokens > 0, "1 or more"),
            ("stop", all(self.stop), "strings of at least one character"),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}, allowed: {allowed}")

    def _has_biases(self) -> bool:
        return all(token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias)


class Constraint(Protocol):
    """What a text has to follow, a grammar for example."""

    def allow(self, logits: Floats) -> Floats:
        """Return logits (V,), −inf for tokens that cannot come next."""

    def accept(self, token: int) -> None:
        """Note that `token` came next."""


class Sampler:
    """Draws the tokens of one text; the same seed and logits give the same tokens."""

    def __init__(self, settings: SamplingSettings, constraint: Constraint | None = None) -> None:
        """Seed a generator of its own, from entropy when the settings have no seed."""
        self.settings = settings
        self.constraint = constraint
        self._generator = np.random.default_rng(settings.seed)
        self._drawn: Counter[int] = Counter()

    def choose(self, logits: Floats, ids: Sequence[int]) -> int:
        """Choose a token from logits (V,) after the text `ids`."""
        logits = penalize(logits, ids, self.settings.repetition_penalty)
        logits = offset(logits, self._drawn, self.settings)
        if self.constraint is None:
            token = self._draw(logits)
        else:
            token = self._draw(self.constraint.allow(logits))
            self.constraint.accept(token)
        self._drawn[token] += 1
        return token

    def _draw(self, logits: Floats) -> int:
        settings = self.settings
        if settings.temperature == 0:
            return int(logits.argmax())
        if settings.temperature != 1:
            logits = logits / np.float32(settings.temperature)
        ends = softmax(truncate(logits, settings)).cumsum(dtype=np.float64)
        place = self._generator.random() * ends[-1]  # the sum misses 1 by rounding
        return min(int(ends.searchsorted(place, side="right")), len(ends) - 1)


def softmax(logits: Floats) -> Floats:
    """Return the probabilities (V,) of logits (V,)."""
    raised = np.exp(logits - logits.max())
    return raised / raised.sum(dtype=np.float64).astype(np.float32)


def penalize(logits: Floats, ids: Sequence[int], penalty: float) -> Floats:
    """Divide positive and multiply negative logits (V,) of tokens in `ids` by `penalty`."""
    if penalty == 1 or not ids:
        return logits
    seen = np.unique(np.asarray(ids, np.int64))
    logits = logits.copy()
    values, factor = logits[seen], np.float32(penalty)
    logits[seen] = np.where(values > 0, values / factor, values * factor)
    return logits


def offset(logits: Floats, drawn: Counter[int], settings: SamplingSettings) -> Floats:
    """Add biases to logits (V,), and take off the penalties of tokens drawn so many times."""
    is_penalized = settings.presence_penalty or settings.frequency_penalty
    if not settings.logit_bias and not (is_penalized and drawn):
        return logits
    logits = logits.copy()
    for token, bias in settings.logit_bias:
        logits[token] += bias
    if is_penalized:
        for token, count in drawn.items():
            logits[token] -= settings.presence_penalty + count * settings.frequency_penalty
    return logits


def truncate(logits: Floats, settings: SamplingSettings) -> Floats:
    """Set to −inf the logits (V,) that top-k, then top-p, then min-p leave out.

    top-p keeps the fewest likeliest tokens whose probabilities reach it; the likeliest token
    always stays.
    """
    never = np.float32(-math.inf)
    if 0 < settings.top_k < len(logits):
        least = np.partition(logits, -settings.top_k)[-settings.top_k]
        logits = np.where(logits < least, never, logits)
    if settings.top_p < 1:
        order = np.argsort(-logits, kind="stable")
        probabilities = softmax(logits[order])
        left_out = probabilities.cumsum() - probabilities >= settings.top_p
        logits = logits.copy()
        logits[order[left_out]] = never
    if settings.min_p > 0:
        least = logits.max() + np.float32(math.log(settings.min_p))
        logits = np.where(logits < least, never, logits)
    return logits

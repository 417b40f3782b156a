"""From logits to the next token: penalty, temperature, truncation, draw.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvxq.errors import ArgumentError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen and when to stop; the defaults sample the model as it is.

    temperature: 0 chooses the likeliest token; top_k: 0 keeps all; top_p: 1 keeps all; min_p:
    least probability as a share of the likeliest token's, 0 keeps all; repetition_penalty: > 1
    lowers tokens that occurred; seed: None draws differently each time; max_tokens: None goes on
    to the end of the text or of the context; stop: strings that end the text and are not shown.
    Raises ArgumentError for a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
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
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "0 to 2^63 − 1"),
            ("max_tokens", self.max_tokens is None or self.max_tokens > 0, "1 or more"),
            ("stop", all(self.stop), "strings of at least one character"),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}, allowed: {allowed}")


class Sampler:
    """Draws tokens by `settings`; the same seed and logits give the same tokens."""

    def __init__(self, settings: SamplingSettings) -> None:
        """Seed a generator of its own, from entropy when the settings have no seed."""
        self.settings = settings
        self._generator = np.random.default_rng(settings.seed)

    def choose(self, logits: Floats, ids: Sequence[int]) -> int:
        """Choose a token from logits (V,) after the text `ids`."""
        settings = self.settings
        logits = penalize(logits, ids, settings.repetition_penalty)
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

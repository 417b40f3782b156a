"""The tokens a model has read, and what of them the next text can reuse.

A `Session` outlives one answer: the next prompt of a chat usually begins with everything read so
far, and only what differs is computed.

When the context is full, a text ends, or goes on without its oldest half.  What is left then stands
at other places, so it is read anew: half a context for half a context of new tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cvxq.errors import ArgumentError, ContextError
from cvxq.sample import Sampler, SamplingSettings
from cvxq.stream import shared_length

Logits = npt.NDArray[np.float32]


class Session(ABC):
    """A model in the middle of a text: `ids` are the tokens read so far.

    keep: None ends a text when the context is full; else the oldest half of its tokens is dropped
    then, but for the first `keep`.
    """

    def __init__(self, context_length: int | None) -> None:
        """Start with an empty text; `context_length` None means that there is no limit."""
        self.context_length = context_length
        self.keep: int | None = None
        self.ids: list[int] = []

    @property
    def room(self) -> int | None:
        """How many tokens may still be read, or None when there is no limit."""
        return None if self.context_length is None else self.context_length - len(self.ids)

    def resume(self, ids: Sequence[int]) -> Logits:
        """Read the text `ids` from its beginning, computing only what differs from before.

        Returns the logits (V,) float32 after its last token.  Raises ContextError when it is
        longer than the context.
        """
        if not ids:
            raise ArgumentError("the prompt has no tokens; give at least one")
        if self.context_length is not None and len(ids) > self.context_length:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, but the model's context holds "
                f"{self.context_length}; shorten it, or give it more with --context"
            )
        self.rewind(shared_length(self.ids, ids[:-1]))
        return self.feed(ids[len(self.ids) :])

    def feed(self, ids: Sequence[int]) -> Logits:
        """Read `ids` (at least one) after the text so far; return logits (V,) float32."""
        if self.room is not None and len(ids) > self.room:
            raise ContextError(f"the model's context of {self.context_length} tokens is full")
        return self._read(ids)

    def draw(self, ids: Sequence[int], settings: SamplingSettings) -> Iterator[int]:
        """Yield the tokens that follow the text `ids`, which is resumed, until the context is full.

        With `keep` they never end.  How many, and which of them end the text, is for the caller to
        judge.  A token may have been read when it is yielded, or be read when the next one is asked
        for.
        """
        text = list(ids)
        while True:
            for token in self._draw(text, settings):
                text.append(token)
                yield token
            if self.keep is None:
                return
            text = without_oldest_half(text, self.keep)
            settings = reseeded(settings, len(text))

    def _draw(self, ids: Sequence[int], settings: SamplingSettings) -> Iterator[int]:
        """Yield the tokens that follow the text `ids`, until the context is full."""
        sampler = Sampler(settings)
        logits = self.resume(ids)
        text = list(ids)
        while True:
            token = sampler.choose(logits, text)
            text.append(token)
            yield token
            if self.room == 0:
                return
            logits = self.feed([token])

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, or even more where nothing can be kept."""

    @abstractmethod
    def _read(self, ids: Sequence[int]) -> Logits:
        """Read `ids`, which fit the context, and append them to `self.ids`."""


def without_oldest_half(ids: Sequence[int], keep: int) -> list[int]:
    """Return `ids`, at least two, without the older half of those after the first `keep`."""
    begin = min(keep, len(ids) // 2)
    dropped = max(1, (len(ids) - begin) // 2)
    return [*ids[:begin], *ids[begin + dropped :]]


def reseeded(settings: SamplingSettings, places: int) -> SamplingSettings:
    """Return `settings` with another seed, to go on after `places` tokens with fresh draws."""
    return settings if settings.seed is None else replace(settings, seed=settings.seed + places)

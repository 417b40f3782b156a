"""The tokens a model has read, and what of them the next text can reuse.

A `Session` outlives one answer: the next prompt of a chat usually begins with everything read so
far, and only what differs is computed.

When the context is full, a text ends, or goes on without its oldest half.  What is left then stands
at other places, so it is read anew: half a context for half a context of new tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cvxq.errors import ArgumentError, ContextError
from cvxq.sample import Sampler, SamplingSettings
from cvxq.stream import shared_length

_SCORED_TOKENS = 64  # whose logits are held at a time

Logits = npt.NDArray[np.float32]


class Session(ABC):
    """A model in the middle of a text: `ids` are the tokens read so far.

    keep: None ends a text when the context is full; else the oldest half of its tokens is dropped
    then, but for the first `keep`.  piece: read prompts in pieces of so many tokens, and reuse only
    whole ones, so that what was read before changes no bit of the logits (a kernel may round a
    token's row otherwise when it is read alone); None reuses all it can.  check: called before each
    piece and each token that is read; what it raises ends the text there, the session being usable.
    """

    can_rewind = True  # without reading everything anew

    def __init__(self, context_length: int | None) -> None:
        """Start with an empty text; `context_length` None means that there is no limit."""
        self.context_length = context_length
        self.keep: int | None = None
        self.piece: int | None = None
        self.check: Callable[[], None] = _nothing
        self.ids: list[int] = []
        self.settled = 0  # tokens at the beginning that were read in whole pieces: can be reused

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
        self.rewind(self.reusable(ids))
        piece = self.piece if self.piece and self.can_rewind else len(ids)
        while len(self.ids) < len(ids):
            self.check()
            start = len(self.ids)
            logits = self.feed(ids[start : start + piece])
            self.settled = len(self.ids) // piece * piece
        return logits

    def reusable(self, ids: Sequence[int]) -> int:
        """How many tokens of the text `ids` would not be computed again."""
        shared = shared_length(self.ids, ids[:-1])
        if not self.piece or not self.can_rewind:
            return shared
        return min(shared, self.settled) // self.piece * self.piece

    def feed(self, ids: Sequence[int]) -> Logits:
        """Read `ids` (at least one) after the text so far; return logits (V,) float32."""
        if self.room is not None and len(ids) > self.room:
            raise ContextError(
                f"the model's context of {self.context_length} tokens is full; begin a new text"
            )
        return self._read(ids)

    def feed_each(self, ids: Sequence[int]) -> Logits:
        """Read `ids` (at least one) as `feed` does; return logits (n, V) after each of them."""
        if self.room is not None and len(ids) > self.room:
            raise ContextError(
                f"the model's context of {self.context_length} tokens is full; begin anew"
            )
        return self._read_each(ids)

    def score(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Read the text `ids` anew; yield the logits (n, V) after each token, piece by piece."""
        self.rewind(0)
        piece = self.piece or _SCORED_TOKENS
        for start in range(0, len(ids), piece):
            self.check()
            yield self._read_each(ids[start : start + piece])
            self.settled = len(self.ids) // piece * piece

    def draw(
        self, ids: Sequence[int], settings: SamplingSettings, sampler: Sampler | None = None
    ) -> Iterator[int]:
        """Yield the tokens that follow the text `ids`, which is resumed, until the context is full.

        With `keep` they never end.  How many, and which of them end the text, is for the caller to
        judge.  A token may have been read when it is yielded, or be read when the next one is asked
        for.  sampler: chooses them in place of one by `settings`, on the host in any case.
        """
        text = list(ids)
        while True:
            for token in self._draw(text, settings, sampler):
                if self.keep is not None:
                    text.append(token)
                yield token
            if self.keep is None:
                return
            text = without_oldest_half(text, self.keep)
            settings = reseeded(settings, len(text))

    def _draw(
        self, ids: Sequence[int], settings: SamplingSettings, sampler: Sampler | None
    ) -> Iterator[int]:
        """Yield the tokens that follow the text `ids`, until the context is full."""
        sampler = sampler or Sampler(settings)
        logits = self.resume(ids)
        text = list(ids)
        while True:
            token = sampler.choose(logits, text)
            text.append(token)
            yield token
            if self.room == 0:
                return
            self.check()
            logits = self.feed([token])

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, or even more where nothing can be kept."""

    @abstractmethod
    def _read(self, ids: Sequence[int]) -> Logits:
        """Read `ids`, which fit the context, and append them to `self.ids`."""

    def _read_each(self, ids: Sequence[int]) -> Logits:
        """Read `ids` as `_read` does; return the logits (n, V) after each of them."""
        return np.stack([self.feed([token]) for token in ids])


def _nothing() -> None:
    """Let the reading go on."""


def without_oldest_half(ids: Sequence[int], keep: int) -> list[int]:
    """Return `ids`, at least two, without the older half of those after the first `keep`."""
    begin = min(keep, len(ids) // 2)
    dropped = max(1, (len(ids) - begin) // 2)
    return [*ids[:begin], *ids[begin + dropped :]]


def reseeded(settings: SamplingSettings, places: int) -> SamplingSettings:
    """Return `settings` with another seed, to go on after `places` tokens with fresh draws."""
    return settings if settings.seed is None else replace(settings, seed=settings.seed + places)

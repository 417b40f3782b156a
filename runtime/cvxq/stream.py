"""Tokens to text while they arrive: whole characters only, and nothing of a stop string.

A token may end inside a character (byte-level vocabularies, byte fallback), which decoders show
as U+FFFD.  So text is shown only up to the U+FFFD characters at its end, and an incomplete
character at the very end of an answer is left out.  Only a window of the last tokens is decoded
for each new one.  It never begins inside a character, and the text at its beginning, where
decoders may drop a space, has always been shown already.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

_UNKNOWN = "\ufffd"
_WINDOW = 16  # tokens decoded again; enough for what joins across tokens
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens
_PATIENCE = 64  # tokens held back at most: longer runs of U+FFFD are no incomplete character


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """Return the text of the tokens."""


def shared_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how many items two sequences have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class TextStream:
    """Turns one token after the other into the text that it completes."""

    def __init__(self, tokenizer: Decoder, context: Sequence[int] = ()) -> None:
        """Continue after the tokens `context`, whose text is taken as shown already."""
        self._tokenizer = tokenizer
        self._ids = list(context[-_WINDOW:])
        for _ in range(_LONGEST_CHARACTER - 1):
            if len(context) > _WINDOW and self._text().startswith(_UNKNOWN):
                del self._ids[0]  # the rest of a character that began before the window
        self._shown = len(self._whole(self._text()))
        self._pending = 0

    def push(self, token: int) -> str:
        """Add a token; return the text that can be shown now, often more or less than its own."""
        self._ids.append(token)
        self._pending += 1
        text = self._text()
        whole = text if self._pending > _PATIENCE else self._whole(text)
        new = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if len(whole) == len(text):
            self._pending = 0
            if len(self._ids) > 2 * _WINDOW:
                self._move_window(text)
        return new

    def _move_window(self, text: str) -> None:
        """Let the window begin at a later token, one that begins a character."""
        everything = self._ids
        for size in range(_WINDOW, _WINDOW + _LONGEST_CHARACTER):
            self._ids = everything[-size:]
            rest = self._text()
            if text.endswith(rest):
                self._shown = len(rest)
                return
        self._ids = everything

    def _text(self) -> str:
        if not self._ids:
            return ""
        return self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @staticmethod
    def _whole(text: str) -> str:
        return text.rstrip(_UNKNOWN)


class StopStrings:
    """Passes text on until a stop string is complete, holding back what may become one.

    The stop string that is complete first counts, so the result does not depend on how the text
    was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for `stops`, none of them empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; return what can be shown.  After `found` is set nothing more comes."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [
            (place + len(stop), place, stop)
            for stop in self._stops
            if (place := self._held.find(stop)) >= 0
        ]
        if hits:
            _, place, self.found = min(hits)
            shown, self._held = self._held[:place], ""
            return shown
        keep = possible_start(self._held, self._stops)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown

    def finish(self) -> str:
        """Return what was held back, now that the text has ended without a stop string."""
        shown, self._held = self._held, ""
        return shown


def possible_start(text: str, wanted: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that begins one of `wanted`, but is not it."""
    longest = max((len(item) for item in wanted), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(item.startswith(text[-length:]) for item in wanted):
            return length
    return 0

"""Special tokens, which decoding leaves out of a text, where a text has to show or to know them.

Each stands for one character that no decoded text has, so that a stop string may hold it beside
other text, and is not found within the spelling of one that nobody sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cvxq.stream import Decoder

_FIRST_MARK = 0xD800  # surrogates: never in text that was decoded
_MOST_MARKS = 0x800


class TextTokenizer(Decoder, Protocol):
    """A decoder that also encodes."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Return a mapping whose "input_ids" are the tokens of `text`."""


def hidden_tokens(tokenizer: TextTokenizer, text: str) -> dict[int, str]:
    """Return the tokens in `text` that decoding leaves out, and their spelling."""
    found = {}
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        spelling, shown = (
            tokenizer.decode(
                [token], skip_special_tokens=skipped, clean_up_tokenization_spaces=False
            )
            for skipped in (False, True)
        )
        if spelling and spelling in text and not shown:
            found[token] = spelling
    return found


class SpecialMarks:
    """The characters that stand for the special tokens in some texts.

    stops: the stop strings, those with special tokens in both spellings.
    """

    def __init__(
        self, tokenizer: TextTokenizer, stops: Sequence[str], kept: Sequence[str] = ()
    ) -> None:
        """Mark the special tokens of `stops`, which stay unseen, and of `kept`, which are shown."""
        shown = _all_hidden(tokenizer, kept)
        tokens = {**_all_hidden(tokenizer, stops), **shown}
        self._marks = {
            token: chr(_FIRST_MARK + index)
            for index, token in zip(range(_MOST_MARKS), tokens, strict=False)
        }
        self._spelled = str.maketrans(
            {mark: shown.get(token, "") for token, mark in self._marks.items()}
        )
        spellings = sorted(self._marks, key=lambda token: -len(tokens[token]))
        marked = []
        for stop in stops:
            for token in spellings:
                stop = stop.replace(tokens[token], self._marks[token])
            marked.append(stop)
        self.stops = tuple(dict.fromkeys([*stops, *marked]))

    def mark(self, token: int) -> str:
        """Return the character of a token, nothing for one without."""
        return self._marks.get(token, "")

    def show(self, text: str) -> str:
        """Return `text` with the tokens spelled out that are to be shown, without the others."""
        return text.translate(self._spelled)


def _all_hidden(tokenizer: TextTokenizer, texts: Sequence[str]) -> dict[int, str]:
    return {token: name for text in texts for token, name in hidden_tokens(tokenizer, text).items()}

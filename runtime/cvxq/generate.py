"""Token after token, and the text they make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cvxq.sample import Sampler, SamplingSettings
from cvxq.session import Session
from cvxq.specials import SpecialMarks, TextTokenizer
from cvxq.stream import StopStrings, TextStream

FinishReason = Literal["end", "stop", "length", "context"]


@dataclass(frozen=True)
class Generation:
    """What was generated: its tokens, their text, and why it ended.

    text: cut before a stop string and without special tokens, except those that were to be kept;
    ids: all tokens drawn, an end-of-text token included; finish: "end" (end-of-text token), "stop"
    (a stop string), "length" (max_tokens) or "context" (the context is full).
    """

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish: FinishReason


def generate_tokens(
    session: Session,
    prompt_ids: Sequence[int],
    settings: SamplingSettings,
    end_ids: Collection[int] = (),
    sampler: Sampler | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt_ids`, the last one being of `end_ids` if one came.

    What the session has read already of the prompt is not computed again.  Ends after
    `settings.max_tokens`, or when the context is full.  Raises ContextError when the prompt
    alone does not fit.  sampler: see `Session.draw`.
    """
    for count, token in enumerate(session.draw(prompt_ids, settings, sampler), start=1):
        yield token
        if token in end_ids or count == settings.max_tokens:
            return


def generate_text(
    session: Session,
    tokenizer: TextTokenizer,
    prompt_ids: Sequence[int],
    settings: SamplingSettings,
    end_ids: Collection[int] = (),
    on_text: Callable[[str], None] | None = None,
    kept: Sequence[str] = (),
    sampler: Sampler | None = None,
) -> Generation:
    """Generate a continuation of `prompt_ids`, handing each new piece of text to `on_text`.

    Pieces are whole characters; together they are the text of the result.  Stop strings may have
    special tokens in them.  kept: texts whose special tokens are not left out of the result.
    sampler: see `Session.draw`.
    """
    answer = Answer(tokenizer, prompt_ids, settings, end_ids, on_text, kept)
    for token in generate_tokens(session, prompt_ids, settings, end_ids, sampler):
        if answer.push(token):
            break
    return answer.finish()


class Answer:
    """The text that tokens make, one after the other; the arguments are `generate_text`'s."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int],
        settings: SamplingSettings,
        end_ids: Collection[int] = (),
        on_text: Callable[[str], None] | None = None,
        kept: Sequence[str] = (),
    ) -> None:
        """Begin after the prompt."""
        self._stream = TextStream(tokenizer, prompt_ids)
        self._specials = SpecialMarks(tokenizer, settings.stop, kept)
        self._stops = StopStrings(self._specials.stops)
        self._prompt, self._end_ids, self._most = prompt_ids, end_ids, settings.max_tokens
        self._on_text = on_text
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._finish: FinishReason = "context"

    def push(self, token: int) -> bool:
        """Add a token; tell whether it was the last."""
        self._ids.append(token)
        text = "" if token in self._end_ids else self._stream.push(token)
        self._show(self._stops.push(text + self._specials.mark(token)))
        if self._stops.found is not None:
            self._finish = "stop"
        elif token in self._end_ids:
            self._finish = "end"
        elif len(self._ids) == self._most:
            self._finish = "length"
        return self._finish != "context"

    def finish(self) -> Generation:
        """Show what was held back, and return all."""
        self._show(self._stops.finish())
        return Generation(
            "".join(self._pieces), tuple(self._ids), tuple(self._prompt), self._finish
        )

    def _show(self, piece: str) -> None:
        if piece := self._specials.show(piece):
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)

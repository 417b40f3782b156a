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
    stream = TextStream(tokenizer, prompt_ids)
    specials = SpecialMarks(tokenizer, settings.stop, kept)
    stops = StopStrings(specials.stops)
    ids: list[int] = []
    pieces: list[str] = []

    def show(piece: str) -> None:
        if piece := specials.show(piece):
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    finish: FinishReason = "context"
    for token in generate_tokens(session, prompt_ids, settings, end_ids, sampler):
        ids.append(token)
        text = "" if token in end_ids else stream.push(token)
        show(stops.push(text + specials.mark(token)))
        if stops.found is not None:
            finish = "stop"
            break
        if token in end_ids:
            finish = "end"
            break
        if len(ids) == settings.max_tokens:
            finish = "length"
    show(stops.finish())
    return Generation("".join(pieces), tuple(ids), tuple(prompt_ids), finish)

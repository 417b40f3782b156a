"""What a model thinks before it answers, kept apart from the answer.

The thinking stands between two marks at the beginning of a reply.  Some templates write the
opening mark themselves, at the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cvxq.stream import possible_start


class Marks(NamedTuple):
    """The texts around a model's thinking."""

    opening: str
    closing: str


USUAL_MARKS = Marks("<think>", "</think>")
KNOWN_MARKS = (
    USUAL_MARKS,
    Marks("[THINK]", "[/THINK]"),
    Marks("<thinking>", "</thinking>"),
    Marks("<thought>", "</thought>"),
    Marks("<reasoning>", "</reasoning>"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|begin_of_thought|>", "<|end_of_thought|>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<|channel>thought", "<channel|>"),
    Marks("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)


def opened_marks(prompt: str, marks: Sequence[Marks]) -> Marks | None:
    """Return the marks whose opening one ends `prompt`, white space aside."""
    end = prompt.rstrip()
    return next((pair for pair in marks if end.endswith(pair.opening)), None)


class Reply:
    """A model's reply, which arrives in pieces, parted into thinking and answer.

    answer: without white space at its ends; thought: without marks either; is_thinking: the
    thinking has begun and not ended.
    """

    def __init__(self, marks: Sequence[Marks], opened: Marks | None = None) -> None:
        """Expect thinking between any of `marks`; opened: those whose thinking has begun."""
        self._marks = marks
        self._pair = opened
        self._is_answer = False
        self._held = opened.opening if opened else ""
        self._parts: dict[bool, list[str]] = {True: [], False: []}

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is thinking."""
        return self._pair is not None and not self._is_answer

    @property
    def answer(self) -> str:
        """The answer so far."""
        return "".join(self._parts[False]).strip()

    @property
    def thought(self) -> str:
        """The thinking so far."""
        return self.without_marks("".join(self._parts[True]).rstrip()).strip()

    def without_marks(self, part: str) -> str:
        """Return a part of the thinking, as `push` gives it, without the marks at its ends."""
        if self._pair is None:
            return part
        return part.removeprefix(self._pair.opening).removesuffix(self._pair.closing)

    def push(self, piece: str) -> list[tuple[str, bool]]:
        """Add a piece; return what can be shown now, each part with whether it is thinking.

        Marks belong to the thinking, and so does the white space after them.  White space before
        the reply is left out.
        """
        self._held += piece
        if self._pair is None and not self._is_answer:
            self._begin()
        parts = []
        if self.is_thinking:
            parts.append((self._take_thought(), True))
        if self._is_answer:
            if self._pair is not None and not self._parts[False]:
                answer = self._held.lstrip()
                parts.append((self._held.removesuffix(answer), True))
                self._held = answer
            parts.append((self._held, False))
            self._held = ""
        return self._note(parts)

    def finish(self) -> list[tuple[str, bool]]:
        """Return what was held back, now that the reply has ended."""
        rest, self._held = self._held, ""
        return self._note([(rest, self.is_thinking)])

    def _begin(self) -> None:
        """Decide whether the reply begins with thinking, as soon as that is certain."""
        self._held = self._held.lstrip()
        self._pair = next((p for p in self._marks if self._held.startswith(p.opening)), None)
        may_begin = any(pair.opening.startswith(self._held) for pair in self._marks)
        self._is_answer = self._pair is None and not may_begin

    def _take_thought(self) -> str:
        assert self._pair is not None
        closing = self._pair.closing
        place = self._held.find(closing)
        if place >= 0:
            self._is_answer = True
            end = place + len(closing)
        else:
            end = len(self._held) - possible_start(self._held, (closing,))
        thought, self._held = self._held[:end], self._held[end:]
        return thought

    def _note(self, parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
        parts = [(text, is_thought) for text, is_thought in parts if text]
        for text, is_thought in parts:
            self._parts[is_thought].append(text)
        return parts

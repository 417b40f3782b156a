"""A conversation: its turns, and what is dropped when the context is full.

The tokens of the whole history are rendered anew for every turn (`cvxq.turns`). Whoever generates
the answer compares them with the tokens its cache holds and computes only what lies beyond the
common prefix; so templates may rewrite earlier turns (some drop the reasoning of old answers) and
the result is still right, merely slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cvxq.errors import ChatError
from cvxq.stream import shared_length
from cvxq.turns import Message, TurnFormat, turn_format

__all__ = ["ChatError", "Conversation", "Message", "Prompt", "TurnFormat", "turn_format"]


@dataclass(frozen=True)
class Prompt:
    """The tokens to answer, how many answer tokens fit, and how many old turns had to go.

    keep: tokens at the beginning that stay when the answer fills the context; None: it ends there.
    """

    ids: list[int]
    room: int
    dropped_turns: int
    keep: int | None = None


@dataclass
class Conversation:
    """History within a context of `context_length` tokens; None means that there is no limit.

    answer_tokens: the most that an answer may take. Room for it is kept free, but no more than a
    quarter of the context, so that a generous limit does not cost the history.  shifts: an answer
    that fills the context goes on without the oldest tokens.
    """

    encode: Callable[[list[Message]], list[int]]
    context_length: int | None
    answer_tokens: int
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    shifts: bool = False

    def ask(self, text: str) -> Prompt:
        """Add the user's turn and render the history, oldest turns dropped until it fits.

        Raises ChatError, the turn withdrawn again, when it does not fit even alone.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            return self._fit()
        except ChatError:
            self.withdraw()
            raise

    def _fit(self) -> Prompt:
        dropped = 0
        ids = self._render()
        if self.context_length is None:
            return Prompt(ids, self.answer_tokens, dropped)
        reserve = min(self.answer_tokens, max(1, self.context_length // 4))
        while len(ids) + reserve > self.context_length:
            if len(self.messages) == 1:
                raise ChatError(
                    f"this message takes {len(ids)} tokens with its frame, but the context holds "
                    f"{self.context_length}, {reserve} of them kept for the answer; shorten it"
                )
            del self.messages[:2]  # a question and its answer
            dropped += 1
            ids = self._render()
        if self.shifts:
            return Prompt(ids, self.answer_tokens, dropped, self._opening(ids))
        return Prompt(ids, min(self.answer_tokens, self.context_length - len(ids)), dropped)

    def _opening(self, ids: list[int]) -> int:
        """How many of the tokens `ids` come before the text of the first message."""
        return shared_length(ids, self._render([{"role": "user", "content": "."}]))

    def answered(self, text: str, thought: str = "") -> None:
        """Add the model's answer, whole or as far as it came, and what it thought before.

        What of earlier thinking the model reads again is for its chat template to say.
        """
        reasoning = {"reasoning_content": thought} if thought else {}
        self.messages.append({"role": "assistant", "content": text, **reasoning})

    def withdraw(self) -> None:
        """Take back the question that got no answer."""
        self.messages.pop()

    def clear(self) -> None:
        """Forget every turn; the system text stays."""
        self.messages.clear()

    def _render(self, messages: list[Message] | None = None) -> list[int]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return self.encode(head + (self.messages if messages is None else messages))

"""A conversation: turns, how they become tokens, and what is dropped when the context is full.

The tokens of the whole history are rendered anew for every turn, by the model's own chat template
or by a plain turn format. Whoever generates the answer compares them with the tokens its cache
holds and computes only what lies beyond the common prefix; so templates may rewrite earlier turns
(some drop the reasoning of old answers) and the result is still right, merely slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from cvxq.errors import ArgumentError

Message = dict[str, str]


class ChatError(ArgumentError):
    """A turn that cannot be rendered or does not fit the context, in one line."""


@dataclass(frozen=True)
class TurnFormat:
    """How messages become the tokens of a prompt that ends where the answer begins.

    stop: texts that end an answer, beside the model's end-of-sequence tokens.
    """

    name: str
    encode: Callable[[list[Message]], list[int]]
    stop: tuple[str, ...]


def turn_format(tokenizer: Any) -> TurnFormat:
    """Return the tokenizer's chat template as a turn format, or the plain one if it has none."""
    if getattr(tokenizer, "chat_template", None):
        return TurnFormat("chat template", lambda turns: _encode_template(tokenizer, turns), ())
    return TurnFormat("plain turns", lambda turns: _encode_plain(tokenizer, turns), ("\nUser:",))


def _encode_template(tokenizer: Any, messages: list[Message]) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author: anything may fail
        raise ChatError(f"the model's chat template refuses these turns: {error}") from error
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_plain(tokenizer: Any, messages: list[Message]) -> list[int]:
    labels = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    turns = [labels[message["role"]] + message["content"].strip() for message in messages]
    return list(tokenizer("\n".join([*turns, "Assistant:"]))["input_ids"])


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
        other = self._render([{"role": "user", "content": "."}])
        pairs = zip(ids, other, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def answered(self, text: str) -> None:
        """Add the model's answer, whole or as far as it came."""
        self.messages.append({"role": "assistant", "content": text})

    def withdraw(self) -> None:
        """Take back the question that got no answer."""
        self.messages.pop()

    def clear(self) -> None:
        """Forget every turn; the system text stays."""
        self.messages.clear()

    def _render(self, messages: list[Message] | None = None) -> list[int]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return self.encode(head + (self.messages if messages is None else messages))

"""Conversations: dropping the oldest turns, refusing what never fits."""

from __future__ import annotations

from typing import Any

import pytest
from cvxq.chat import ChatError, Conversation, Message


def encode(messages: list[Message]) -> list[int]:
    """One token per character of the contents."""
    return [ord(c) for message in messages for c in message["content"]]


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_history_grows_while_it_fits() -> None:
    talk = Conversation(encode, context_length=100, answer_tokens=10)
    assert talk.ask("abc").ids == encode([{"role": "user", "content": "abc"}])
    talk.answered("de")
    prompt = talk.ask("f")
    assert text_of(prompt.ids) == "abcdef"
    assert prompt.dropped_turns == 0
    assert prompt.room == 10


def test_oldest_turns_go_first_and_the_system_text_stays() -> None:
    talk = Conversation(encode, context_length=20, answer_tokens=50, system="SYS")
    for letter in "abc":
        talk.ask(letter * 2)
        talk.answered(letter.upper() * 2)
    # 3 + 3 · 4 + 4 = 19 tokens, and 5 (a quarter of the context) are kept for the answer
    prompt = talk.ask("dddd")
    assert text_of(prompt.ids) == "SYSbbBBccCCdddd"
    assert prompt.dropped_turns == 1
    assert prompt.room == 5
    assert [m["content"] for m in talk.messages] == ["bb", "BB", "cc", "CC", "dddd"]


def test_message_that_never_fits_is_withdrawn() -> None:
    talk = Conversation(encode, context_length=16, answer_tokens=4)
    talk.ask("a")
    talk.answered("b")
    with pytest.raises(ChatError, match=r"takes 13 tokens .* the context holds 16, 4 of them"):
        talk.ask("x" * 13)
    assert text_of(talk.ask("y").ids).endswith("y")
    assert all("x" not in message["content"] for message in talk.messages)


def test_no_limit_drops_nothing() -> None:
    talk = Conversation(encode, context_length=None, answer_tokens=7)
    talk.ask("a" * 10_000)
    talk.answered("b")
    prompt = talk.ask("c")
    assert len(prompt.ids) == 10_002
    assert (prompt.room, prompt.dropped_turns) == (7, 0)


def test_clear_keeps_the_system_text() -> None:
    talk = Conversation(encode, context_length=50, answer_tokens=5, system="SYS")
    talk.ask("a")
    talk.answered("b")
    talk.clear()
    assert text_of(talk.ask("c").ids) == "SYSc"


def test_thinking_is_kept_for_the_template_to_show() -> None:
    talk = Conversation(encode, context_length=50, answer_tokens=5)
    talk.ask("a")
    talk.answered("b", "hm")
    talk.ask("c")
    talk.answered("d")
    assert talk.messages[1] == {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    assert talk.messages[3] == {"role": "assistant", "content": "d"}


def test_question_without_answer_can_be_withdrawn() -> None:
    talk = Conversation(encode, context_length=50, answer_tokens=5)
    talk.ask("a")
    talk.withdraw()
    assert text_of(talk.ask("b").ids) == "b"


def test_encode_errors_leave_no_trace() -> None:
    def refuse(messages: list[Message]) -> list[int]:
        raise ChatError("no")

    talk: Any = Conversation(refuse, context_length=50, answer_tokens=5)
    with pytest.raises(ChatError):
        talk.ask("a")
    assert talk.messages == []

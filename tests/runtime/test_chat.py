"""Conversations: rendering, dropping the oldest turns, refusing what never fits."""

from __future__ import annotations

from typing import Any

import pytest
from cvxq.chat import ChatError, Conversation, Message, turn_format


def encode(messages: list[Message]) -> list[int]:
    """One token per character of the contents."""
    return [ord(c) for message in messages for c in message["content"]]


class CharacterTokenizer:
    """Stands in for a tokenizer: one token per character, 1 as BOS when asked for."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(
        self, messages: list[Message], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        if messages[0]["role"] == "system":
            raise ValueError("System role\nnot supported")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


TURNS = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]


def test_plain_turns_end_where_the_answer_begins() -> None:
    form = turn_format(CharacterTokenizer())
    ids = form.encode([{"role": "system", "content": "Be brief."}, *TURNS])
    assert ids[0] == 1
    assert text_of(ids[1:]) == ("Be brief.\nUser: Hi\nAssistant: Hello.\nUser: Why?\nAssistant:")
    assert form.stop == ("\nUser:",)


def test_template_is_used_and_brings_its_own_special_tokens() -> None:
    tokenizer = CharacterTokenizer()
    tokenizer.chat_template = "template"
    form = turn_format(tokenizer)
    assert text_of(form.encode(TURNS)) == "<user>Hi <assistant>Hello.<user>Why?<assistant>"
    assert form.stop == ()


def test_refusal_of_a_template_is_one_error() -> None:
    tokenizer = CharacterTokenizer()
    tokenizer.chat_template = "template"
    with pytest.raises(ChatError, match="template refuses these turns: System role"):
        turn_format(tokenizer).encode([{"role": "system", "content": "x"}, *TURNS])


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

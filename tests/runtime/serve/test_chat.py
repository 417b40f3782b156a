"""/v1/chat/completions: streams and wholes, choices, limits of a text, caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxq
import pytest
from cvxq.serve.caches import PIECE

LONG = "A long text that goes on and on, so that it fills several pieces. " * 4
Recite = Callable[[cvxq.Model, str], None]


def text_of(answer: dict[str, Any], choice: int = 0) -> str:
    text: str = answer["choices"][choice]["message"]["content"]
    return text


def added_up(events: list[dict[str, Any]], name: str = "content", choice: int = 0) -> str:
    """The text that the deltas of a choice make."""
    deltas = [c["delta"] for e in events for c in e["choices"] if c["index"] == choice]
    return "".join(delta.get(name, "") for delta in deltas)


def test_an_answer_has_the_shape_of_openais(tiny: Any) -> None:
    answer = tiny.chat("Hello", model="tiny")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    prompt = tiny.served.turns.encode([{"role": "user", "content": "Hello"}])
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 12,
        "total_tokens": len(prompt) + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.0, "seed": 5}, {"n": 3, "seed": 1}]
)
def test_a_stream_adds_up_to_the_whole(tiny: Any, options: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20, **options}
    whole = tiny.http.post("/v1/chat/completions", json=body).json()
    usage = {"stream_options": {"include_usage": True}}
    events = tiny.events("/v1/chat/completions", {**body, **usage})
    for choice in range(options.get("n", 1)):
        assert added_up(events, choice=choice) == text_of(whole, choice)
        ends = [c["finish_reason"] for e in events for c in e["choices"] if c["index"] == choice]
        assert [end for end in ends if end] == [whole["choices"][choice]["finish_reason"]]
    counts = whole["usage"], events[-1]["usage"]
    assert counts[0]["completion_tokens"] == counts[1]["completion_tokens"]
    assert events[-1]["choices"] == []
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({event["id"] for event in events}) == 1


def test_choices_differ_and_seeds_decide(tiny: Any) -> None:
    def texts(seed: int) -> list[str]:
        answer = tiny.chat("Hello", n=3, temperature=1.0, seed=seed)
        return [text_of(answer, choice) for choice in range(3)]

    assert texts(1) == texts(1)
    assert len({*texts(1), *texts(9)}) == 6


def test_a_stop_string_is_not_in_the_text(tiny: Any) -> None:
    whole = text_of(tiny.chat("Hello", max_tokens=30))
    stop = whole[8:10]
    answer = tiny.chat("Hello", max_tokens=30, stop=stop)
    assert text_of(answer) == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_penalties_and_biases_change_what_is_drawn(tiny: Any) -> None:
    plain = text_of(tiny.chat("Hello", max_tokens=60))
    once = text_of(tiny.chat("Hello", max_tokens=60, frequency_penalty=2, presence_penalty=2))
    assert len(set(once)) > len(set(plain))
    token = tiny.served.tokenizer("A", add_special_tokens=False)["input_ids"][0]
    assert text_of(tiny.chat("Hello", logit_bias={str(token): 100})) == "A" * 12


def test_log_probabilities_tell_of_each_token(tiny: Any) -> None:
    answer = tiny.chat("Hello", logprobs=True, top_logprobs=3)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 12
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] < 0  # greedy
        assert entry["bytes"] == list(entry["token"].encode())
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
    events = tiny.events("/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 3})
    parts = [c["logprobs"]["content"] for e in events for c in e["choices"] if c["logprobs"]]
    assert [entry for part in parts for entry in part] == entries


def test_thinking_is_apart_from_the_answer(tiny: Any, recite: Recite) -> None:
    recite(tiny.served.model, "<think>\nLet me see.\n</think>\n\nFour. ")
    answer = tiny.chat("2 + 2?", max_tokens=100)
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Four. ",
        "reasoning_content": "Let me see.",
    }
    events = tiny.events("/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}]})
    assert added_up(events) == "Four. "
    assert added_up(events, "reasoning_content") == "Let me see."


def test_contents_in_parts_and_other_roles_are_understood(tiny: Any) -> None:
    def tokens(messages: list[dict[str, Any]]) -> list[int]:
        found: list[int] = tiny.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        return found

    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    fancy = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert tokens(plain) == tokens(fancy)


def test_the_cache_changes_nothing_but_the_time(tiny: Any) -> None:
    first = tiny.chat(LONG)
    again = tiny.chat(LONG)
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    reused = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert reused == first["usage"]["prompt_tokens"] // PIECE * PIECE
    assert text_of(again) == text_of(first)
    tiny.chat(LONG[:100])
    tiny.chat(LONG, text_of(first), "And then?")
    assert text_of(tiny.chat(LONG)) == text_of(first)


def test_chats_that_alternate_keep_their_caches(tiny: Any) -> None:
    """Two chats, with a request for a title after each turn, as Open WebUI sends."""
    talks: list[list[str]] = [[LONG], [LONG[::-1]]]
    for turn in range(3):
        for talk in talks:
            answer = tiny.chat(*talk)
            usage = answer["usage"]
            if turn:
                before = sum(len(text) for text in talk[:-1]) // PIECE * PIECE
                assert usage["prompt_tokens_details"]["cached_tokens"] >= before - PIECE
            tiny.chat("Write a title for: " + talk[0][: 40 + turn])
            talk += [text_of(answer), f"More of it, please, number {turn}."]

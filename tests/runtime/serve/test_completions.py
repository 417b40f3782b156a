"""/v1/completions: prompts of every kind, echo, log probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def test_a_text_and_its_tokens_are_continued_alike(tiny: Any) -> None:
    ids = tiny.served.model.encode("Hello")
    of_text, of_ids = (
        tiny.complete(prompt, temperature=0, max_tokens=8) for prompt in ("Hello", ids)
    )
    assert of_text["choices"] == of_ids["choices"]
    assert of_text["object"] == "text_completion"
    assert of_text["usage"]["completion_tokens"] == 8


def test_several_prompts_with_several_choices(tiny: Any) -> None:
    answer = tiny.complete(["Hello", "Bye now"], n=2, seed=3, max_tokens=6)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == len("Hello") + len("Bye now")
    assert answer["usage"]["completion_tokens"] == 24
    tokens = [tiny.served.model.encode(text) for text in ("Hello", "Bye now")]
    assert tiny.complete(tokens, n=2, seed=3, max_tokens=6)["choices"] == answer["choices"]


def test_a_stream_adds_up_to_the_whole(tiny: Any) -> None:
    body = {"prompt": ["Hello", "Bye"], "temperature": 0, "max_tokens": 9, "logprobs": 2}
    whole = tiny.complete(**body)
    events = tiny.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    for index, choice in enumerate(whole["choices"]):
        parts = [c for e in events for c in e["choices"] if c["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][name]] == values
    assert events[-1]["usage"]["completion_tokens"] == 18


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echo_scores_the_prompt(tiny: Any, max_tokens: int) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 3
    ids = tiny.served.model.encode(text)
    answer = tiny.complete(ids, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    [choice] = answer["choices"]
    assert choice["text"].startswith(text)
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + max_tokens
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    session = tiny.served.model.session()
    for place in range(1, len(ids)):
        logits = session.feed([ids[place - 1]]).astype(np.float64)
        expected = logits[ids[place]] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        # Rounded products may differ between tokens that are read alone and together.
        assert found["token_logprobs"][place] == pytest.approx(expected, abs=2e-2)
    assert found["text_offset"][: len(ids)] == list(range(len(ids)))
    assert answer["usage"]["completion_tokens"] == max_tokens


def test_an_echo_without_log_probabilities_is_the_text(tiny: Any) -> None:
    [choice] = tiny.complete("Hello", echo=True, max_tokens=2, temperature=0)["choices"]
    assert choice["text"].startswith("Hello")
    assert len(choice["text"]) > len("Hello")
    assert choice["logprobs"] is None


def test_a_text_ends_where_the_context_does(tiny: Any) -> None:
    prompt = "a" * 2045
    answer = tiny.complete(prompt, max_tokens=50)
    assert answer["usage"]["completion_tokens"] <= 4
    refused = tiny.http.post("/v1/completions", json={"prompt": "a" * 2048})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"

"""Answers that follow a JSON schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cvxq
import pytest

SMOLLM2 = Path(__file__).resolve().parents[3] / "demo" / "SmolLM2-135M-Instruct.cvxq"

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}


def assert_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert isinstance(person["name"], str)
    assert 0 <= person["age"] <= 120
    assert set(person["tags"]) <= {"a", "b"}


def test_every_answer_follows_its_schema(tiny: Any) -> None:
    for seed in range(20):
        answer = tiny.chat(
            "Hi",
            response_format=of_schema(PERSON),
            temperature=1.5,
            seed=seed,
            max_tokens=200,
        )
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "stop"
        assert_person(choice["message"]["content"])


def test_a_stream_follows_it_too(tiny: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "response_format": of_schema(PERSON),
        "max_tokens": 200,
    }
    events = tiny.events("/v1/chat/completions", body)
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert_person("".join(delta.get("content", "") for delta in deltas))


def test_any_object(tiny: Any) -> None:
    answer = tiny.chat("Hi", response_format={"type": "json_object"}, max_tokens=40, seed=3)
    assert answer["choices"][0]["message"]["content"].startswith("{")


def test_responses_follow_schemas(tiny: Any) -> None:
    form = {"type": "json_schema", "name": "person", "schema": PERSON}
    body = {"input": "Hi", "text": {"format": form}, "max_output_tokens": 200}
    answer = tiny.http.post("/v1/responses", json=body).json()
    assert_person(answer["output"][0]["content"][0]["text"])
    assert answer["text"]["format"]["schema"] == PERSON
    answer = tiny.http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1}).json()
    assert answer["text"]["format"] == {"type": "text"}


def test_thinking_that_the_prompt_began_is_free(thinking: Any, serve: Any) -> None:
    """Only what follows the closing mark has to be JSON."""
    with cvxq.load(thinking, context=2048, threads=1) as model, serve(model) as tiny:
        # The mark is one token: a bias makes it come sooner or later.
        [closing] = model.tokenizer("</think>", add_special_tokens=False)["input_ids"]
        answer = tiny.chat(
            "Hi",
            response_format=of_schema(PERSON),
            temperature=1.0,
            seed=4,
            logit_bias={str(closing): 3},
            max_tokens=900,
        )
        message = answer["choices"][0]["message"]
        assert message["reasoning_content"]
        assert_person(message["content"])


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="`make chat-demo` has not made SmolLM2's file")
def test_a_real_model_follows_a_schema_every_time(serve: Any) -> None:
    with cvxq.load(SMOLLM2) as model, serve(model) as server:
        for seed in range(50):
            answer = server.chat(
                "Invent a person and describe them.",
                response_format=of_schema(PERSON),
                temperature=1.0,
                seed=seed,
                max_tokens=120,
            )
            assert_person(answer["choices"][0]["message"]["content"])

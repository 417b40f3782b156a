"""Tool calls by the marks of each family, whole, in pieces, and through the API."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import cvxq
import pytest
from cvxq.serve.tool_calls import (
    CHATML,
    GEMMA,
    GEMMA_4,
    LLAMA,
    MISTRAL,
    Style,
    ToolCallReader,
    tool_style,
)
from hypothesis import given, settings
from hypothesis import strategies as st

CALL = ("weather", {"city": "Paris, France", "days": 3})
WRITTEN: dict[str, tuple[Style, str]] = {
    "chatml": (
        CHATML,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris, France", "days": 3}}\n'
        "</tool_call>",
    ),
    "smollm": (
        CHATML,
        '<tool_call>[{"name": "weather", "arguments": {"city": "Paris, France", "days": 3}}]'
        "</tool_call>",
    ),
    "qwen-coder": (
        CHATML,
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis, France\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    ),
    "llama": (
        LLAMA,
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris, France", "days": 3}}',
    ),
    "llama-bare": (
        LLAMA,
        '{"name": "weather", "parameters": {"city": "Paris, France", "days": 3}}',
    ),
    "mistral": (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris, France", "days": 3}}]',
    ),
    "mistral-newer": (
        MISTRAL,
        '[TOOL_CALLS]weather[CALL_ID]123[ARGS]{"city": "Paris, France", "days": 3}',
    ),
    "gemma": (
        GEMMA,
        "<start_function_call>call:weather{city:<escape>Paris, France<escape>,days:3}"
        "<end_function_call>",
    ),
    "gemma-4": (
        GEMMA_4,
        '<|tool_call>call:weather{city:<|"|>Paris, France<|"|>,days:3}<tool_call|>',
    ),
}


def read(style: Style, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """What is shown, and the calls, when a text comes in pieces."""
    reader = ToolCallReader(style)
    found = [reader.push(piece) for piece in pieces] + [reader.finish()]
    calls = [(call.name, json.loads(call.arguments)) for _, calls in found for call in calls]
    return "".join(text for text, _ in found), calls


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_is_read(name: str) -> None:
    style, text = WRITTEN[name]
    assert read(style, [text]) == ("", [CALL])


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"llama-bare"}))
def test_text_before_a_call_is_shown(name: str) -> None:
    style, text = WRITTEN[name]
    assert read(style, ["Let me look.\n" + text]) == ("Let me look.\n", [CALL])


@pytest.mark.parametrize("name", ["chatml", "mistral-newer", "gemma", "gemma-4"])
def test_calls_follow_each_other(name: str) -> None:
    style, text = WRITTEN[name]
    shown, calls = read(style, [text + "\n" + text])
    assert shown.strip() == ""
    assert calls == [CALL, CALL]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pieces_do_not_matter(data: st.DataObject) -> None:
    style, text = WRITTEN[data.draw(st.sampled_from(sorted(WRITTEN)))]
    before = "" if text.startswith("{") else "So < [TO: "
    whole = before + text
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(style, pieces) == (before, [CALL])


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (CHATML, "<tool_call>no JSON</tool_call> and on"),
        (CHATML, "<tool_call>{'name': 'weather'"),
        (CHATML, '<tool_call>{"name": "weather", "arguments": 3}</tool_call>'),
        (CHATML, "<tool_call>7</tool_call>"),
        (MISTRAL, "[TOOL_CALLS] nothing"),
        (LLAMA, '{"color": "blue"}'),
        (LLAMA, "{nothing"),
        (GEMMA, "<start_function_call>call:weather{city<end_function_call>"),
        (GEMMA_4, "a < b and <|tool"),
        (CHATML, "no call < at all"),
    ],
)
def test_what_is_no_call_is_shown_as_it_is(style: Style, text: str) -> None:
    assert read(style, [text]) == (text, [])
    assert read(style, list(text)) == (text, [])


def test_the_template_tells_the_family() -> None:
    assert tool_style("… <tool_call> …") is CHATML
    assert tool_style("… <|python_tag|> …") is LLAMA
    assert tool_style("… [TOOL_CALLS] …") is MISTRAL
    assert tool_style("… <start_function_call> …") is GEMMA
    assert tool_style("… <|tool_call>call: …") is GEMMA_4
    assert tool_style("unknown") is CHATML


def test_nested_values_of_gemma() -> None:
    text = '<|tool_call>call:f{a:[1,<|"|>x, {y}<|"|>],b:{c:true,d:null,e:-1.5}}<tool_call|>'
    assert read(GEMMA_4, [text]) == (
        "",
        [("f", {"a": [1, "x, {y}"], "b": {"c": True, "d": None, "e": -1.5}})],
    )


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SAID = 'Well. <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
Recite = Callable[[cvxq.Model, str], None]


def test_calls_come_apart_from_the_text(tiny: Any, recite: Recite) -> None:
    recite(tiny.served.model, SAID)
    [choice] = tiny.chat("Weather?", tools=[WEATHER], max_tokens=200)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well. "
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    body = {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER]}
    events = tiny.events("/v1/chat/completions", body)
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    [[streamed]] = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert streamed["index"] == 0
    assert streamed["function"] == call["function"]
    assert "".join(delta.get("content", "") for delta in deltas) == "Well. "


def test_without_tools_the_marks_are_text(tiny: Any, recite: Recite) -> None:
    recite(tiny.served.model, SAID)
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        [choice] = tiny.chat("Weather?", max_tokens=200, **options)["choices"]
        assert choice["message"]["content"] == SAID
        assert choice["finish_reason"] == "stop"


def test_one_call_where_several_are_not_wanted(tiny: Any, recite: Recite) -> None:
    recite(tiny.served.model, SAID + SAID)
    options = {"tools": [WEATHER], "max_tokens": 300}
    [choice] = tiny.chat("?", **options)["choices"]
    assert len(choice["message"]["tool_calls"]) == 2
    [choice] = tiny.chat("?", parallel_tool_calls=False, **options)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_can_be_forced(tiny: Any, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "clock"}}
    tools = [WEATHER] if choice == "required" else [other, WEATHER]
    for seed in range(3):
        answer = tiny.chat(
            "Hi", tools=tools, tool_choice=choice, seed=seed, temperature=1.0, max_tokens=200
        )
        [call] = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert set(json.loads(call["function"]["arguments"])) == {"city"}


def test_earlier_calls_and_results_reach_the_template(tiny: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    tokens = tiny.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = tiny.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>' in text
    assert "<|im_start|>tool\ndone<|im_end|>" in text


def test_a_template_without_tools_refuses_them(make_file: Any, serve: Any, bare: Any) -> None:
    with cvxq.load(bare, context=2048, threads=1) as model, serve(model) as tiny:
        body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER]}
        answer = tiny.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "shows no tools" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "clock"}},
            },
            "'clock' is none of tools",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ],
)
def test_wrong_choices_are_refused(tiny: Any, changes: dict[str, Any], message: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **changes}
    answer = tiny.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]

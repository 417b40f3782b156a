"""The clients that people use: openai, litellm, llm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cvxq
import pytest

openai = pytest.importorskip("openai", reason="a client that the tests use")

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(tiny: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openai_lists_and_chats(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    options = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20


def test_openai_completes_and_echoes(client: Any) -> None:
    options = {"model": "tiny", "prompt": "Hello", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**options)
    assert "".join(
        c.choices[0].text for c in client.completions.create(**options, stream=True)
    ) == (whole.choices[0].text)
    echo = client.completions.create(**options, echo=True, logprobs=1)
    assert echo.choices[0].text == "Hello" + whole.choices[0].text
    assert len(echo.choices[0].logprobs.token_logprobs) == 13


def test_openai_parses_what_follows_a_schema(client: Any) -> None:
    from pydantic import BaseModel, Field

    class Point(BaseModel):
        x: int = Field(ge=0, le=9)
        y: int = Field(ge=0, le=9)

    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 100}
    answer = client.chat.completions.parse(**options, response_format=Point)
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_openai_calls_tools(
    client: Any, tiny: Any, recite: Callable[[cvxq.Model, str], None]
) -> None:
    recite(
        tiny.served.model, '<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>'
    )
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    options = {"model": "tiny", "messages": MESSAGES, "tools": [tool]}
    [call] = client.chat.completions.create(**options).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"zone": "UTC"}
    with client.chat.completions.stream(**options) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.name == "now"
    assert streamed.function.arguments == call.function.arguments


def test_openai_reads_responses(
    client: Any, tiny: Any, recite: Callable[[cvxq.Model, str], None]
) -> None:
    recite(tiny.served.model, "<think>Hm.</think>Hello to you.")
    whole = client.responses.create(model="tiny", input="Hi", instructions="Be kind.")
    assert whole.output_text == "Hello to you."
    assert whole.status == "completed"
    with client.responses.stream(model="tiny", input=MESSAGES) as stream:
        deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(deltas) == "Hello to you."


def test_openai_tells_errors_apart(client: Any, model: Any, serve: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'big'"):
        client.chat.completions.create(model="big", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="context of 2048"):
        client.completions.create(model="tiny", prompt="a" * 3000)
    with (
        serve(model, keys=["right"]) as guarded,
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def run_client(code: str, folder: Path, *arguments: str) -> str:
    """Run a client's code apart, since some change the process that imports them."""
    script = folder / "client.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, "LLM_USER_PATH": str(folder), "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_litellm(tiny: Any, tmp_path: Path) -> None:
    code = """
import json, sys, litellm
common = dict(model="openai/tiny", api_base=sys.argv[1] + "/v1", api_key="none", temperature=0,
              messages=[{"role": "user", "content": "Hello"}], max_tokens=20)
whole = litellm.completion(**common)
stream = litellm.completion(**common, stream=True)
parts = [chunk.choices[0].delta.content or "" for chunk in stream]
print(json.dumps([whole.choices[0].message.content, "".join(parts), whole.usage.total_tokens]))
"""
    whole, streamed, tokens = json.loads(run_client(code, tmp_path, tiny.url).splitlines()[-1])
    answer = tiny.chat("Hello", max_tokens=20)
    assert whole == streamed == answer["choices"][0]["message"]["content"]
    assert tokens == answer["usage"]["total_tokens"]


@pytest.mark.slow
def test_llm(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\\n  model_name: tiny\\n  api_base: {tiny.url}/v1\\n".replace("\\n", "\n")
    )
    code = """
import json, llm
model = llm.get_model("mine")
options = dict(temperature=0, max_tokens=20, key="none")
said = [model.prompt("Hello", stream=stream, **options).text() for stream in (False, True)]
print(json.dumps(said))
"""
    whole, streamed = json.loads(run_client(code, tmp_path).splitlines()[-1])
    assert (
        whole == streamed == tiny.chat("Hello", max_tokens=20)["choices"][0]["message"]["content"]
    )

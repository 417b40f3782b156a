"""A tiny model behind a real HTTP server, in a thread of this process."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")

import cvxq
import httpx
from cvxq.lean.session import LeanSession
from cvxq.serve.app import make_app
from cvxq.serve.metrics import Metrics
from cvxq.serve.run import worker
from cvxq.serve.served import Served
from cvxq.serve.server import Limits, Server
from cvxq.session import Session

CONTEXT = 2048
SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tool_call> {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_files(template: str = TEMPLATE, special: Sequence[str] = SPECIAL) -> dict[str, bytes]:
    """Files of a tokenizer of bytes: 96 tokens, most of printable ASCII and some special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", *special]
    visible = [chr(code) for code in range(33, 127) if chr(code) not in "^~@$Q"]
    characters = ["Ġ", "Ċ", *visible][: 96 - len(names)]
    core = Tokenizer(
        models.BPE({c: i for i, c in enumerate([*names, *characters])}, [], unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in names])
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        "tokenizer.json": core.to_str().encode(),
        "tokenizer_config.json": json.dumps({**config, "chat_template": template}).encode(),
    }


@pytest.fixture
def tokenizer_parts() -> dict[str, bytes]:
    """Files of the tokenizer, by their names in a `.cvxq` file."""
    return tokenizer_files()


@pytest.fixture
def chat_file(make_file: Callable[..., Any]) -> Path:
    """A Llama of some ten thousand parameters that writes nonsense."""
    path: Path = make_file("llama", name="tiny.cvxq", files=tokenizer_files()).path
    return path


@dataclass
class Running:
    """A server that runs, and what is inside it."""

    url: str
    server: Server
    http: httpx.Client

    @property
    def served(self) -> Served:
        """The one model."""
        return next(iter(self.server.models.values()))

    def chat(self, *contents: str, **options: Any) -> dict[str, Any]:
        """Return the answer to turns of user and assistant."""
        response = self.http.post("/v1/chat/completions", json=chat_body(*contents, **options))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def complete(self, prompt: object, **options: Any) -> dict[str, Any]:
        """Return the continuation of a prompt."""
        response = self.http.post("/v1/completions", json={"prompt": prompt, **options})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the events of a stream, all but the mark at its end."""
        found = []
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    found.append(json.loads(line.removeprefix("data: ")))
        return found

    def is_idle(self) -> bool:
        """Whether the decoder has nothing to do."""
        return self.server.engine.is_idle


def chat_body(*contents: str, **options: Any) -> dict[str, Any]:
    """Return the body of a chat request: turns of user and assistant."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": turns, "max_tokens": 12, "temperature": 0, **options}


@contextlib.contextmanager
def running(
    model: cvxq.Model, *, limits: Limits | None = None, sessions: int = 4, **access: Any
) -> Iterator[Running]:
    """Serve a model at a free port."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    metrics = Metrics()
    server = Server({"tiny": Served("tiny", model, sessions, metrics)}, limits or Limits(), metrics)
    uvicorn_server = worker(make_app(server, **access))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not uvicorn_server.started:
            time.sleep(0.005)
        with httpx.Client(base_url=url, timeout=60, verify=False) as http:
            yield Running(url, server, http)
    finally:
        uvicorn_server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture
def serving() -> Any:
    """`running`, for tests that bring a model of their own."""
    return running


@pytest.fixture
def model(chat_file: Path) -> Iterator[cvxq.Model]:
    """The tiny model, with room for longer texts than it was made for."""
    with cvxq.load(chat_file, context=CONTEXT, threads=1) as loaded:
        yield loaded


@pytest.fixture
def tiny(model: cvxq.Model) -> Iterator[Running]:
    """A server of the tiny model."""
    with running(model) as server:
        yield server


@pytest.fixture
def serve() -> Callable[..., Any]:
    """Return the context manager that serves a model with other settings."""
    return running


@pytest.fixture
def recite(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that has a model say a text, and then end: recite(model, text)."""

    def say(model: cvxq.Model, text: str) -> None:
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]

        def draw(self: Session, *_: object) -> Iterator[int]:
            for token in [*ids, 2]:  # </s>
                self.check()
                yield token

        for kind in (Session, LeanSession):
            monkeypatch.setattr(kind, "draw", draw)

    return say


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], float]:
    """Return a function that waits for something, and tells the seconds that it took."""

    def wait(holds: Callable[[], bool]) -> float:
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < 10
            time.sleep(0.002)
        return time.monotonic() - began

    return wait


@pytest.fixture
def bare(make_file: Callable[..., Any]) -> Path:
    """A file whose chat template knows nothing of tools."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    path: Path = make_file("llama", name="bare.cvxq", files=tokenizer_files(template)).path
    return path


@pytest.fixture
def thinking(make_file: Callable[..., Any]) -> Path:
    """A file whose chat template begins the thinking itself."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<think>\n"
    files = tokenizer_files(template, ("<think>", "</think>"))
    path: Path = make_file("llama", name="thinking.cvxq", files=files).path
    return path

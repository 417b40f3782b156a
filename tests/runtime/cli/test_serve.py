"""`cvxq serve`: what it refuses, and a server that starts, answers and ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

pytest.importorskip("starlette", reason="needs the extra `serve`")

import httpx

Cvxq = Callable[..., Result]
MOST_STARTING = 3.0  # times the import of the libraries; 2.1 where nothing else runs


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str, float]]]:
    """Return what starts a server: the process, its address, and seconds until it answered."""
    started: list[subprocess.Popen[str]] = []
    http = httpx.Client(timeout=10)  # takes a while to make

    def run(*arguments: object) -> tuple[subprocess.Popen[str], str, float]:
        began = time.monotonic()
        command = [sys.executable, "-m", "cvxq.cli", "serve", *map(str, arguments)]
        process = subprocess.Popen(
            [*command, "--port", "0"], stderr=subprocess.PIPE, text=True, env={**os.environ}
        )
        started.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"at (http://\S+)", line)
        assert found, line + process.stderr.read()
        while True:
            try:
                assert http.get(found[1] + "/health").status_code == 200
                return process, found[1], time.monotonic() - began
            except httpx.ConnectError:
                time.sleep(0.01)

    yield run
    http.close()
    for process in started:
        process.kill()
        process.communicate()


def seconds_of(code: str) -> float:
    """Return the seconds that a fresh interpreter takes for `code`."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.monotonic() - began


def test_a_server_answers_soon_after_its_libraries_are_imported(
    chat_file: Path, start: Callable[..., tuple[subprocess.Popen[str], str, float]]
) -> None:
    """The bound is what the libraries take on this machine, so that a slow one keeps it, too."""
    libraries = (
        "import click, jinja2, numpy, pydantic, sse_starlette, starlette, tokenizers, uvicorn"
    )
    ratios = []
    for _ in range(4):
        ratios.append(start(chat_file, "--threads", 1)[2] / seconds_of(libraries))
        if ratios[-1] < MOST_STARTING:
            return
    pytest.fail(f"starting took {ratios} times as long as importing its libraries")


def test_starting_imports_nothing_that_only_some_requests_need() -> None:
    code = (
        "import sys, cvxq.serve.run;"
        "sys.exit(str({'llguidance', 'torch', 'transformers'} & set(sys.modules) or ''))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not found.stderr.strip()


def test_a_server_answers_and_ends_by_ctrl_c(
    chat_file: Path,
    model_file: Path,
    start: Callable[..., tuple[subprocess.Popen[str], str, float]],
) -> None:
    process, url, _ = start(chat_file, model_file, "--threads", 1)
    body = {"model": "chat", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 3}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 200
    assert [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["chat", "model"]
    missing = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
    assert "model is missing; served are chat, model" in missing.json()["error"]["message"]
    process.send_signal(signal.SIGINT)
    assert process.wait(10) in (0, 130)
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_a_server_is_not_torn_open_by_mistake(cvxq: Cvxq, model_file: Path, tmp_path: Path) -> None:
    refused = cvxq("serve", model_file, "--host", "0.0.0.0")
    assert refused.exit_code == 2
    assert "give --api-key KEY, or --no-key" in refused.output
    empty = tmp_path / "keys"
    empty.write_text("\n")
    refused = cvxq("serve", model_file, "--api-key", f"@{empty}")
    assert refused.exit_code == 3
    assert "has no key in it" in refused.output
    assert cvxq("serve", model_file, "--api-key", "").exit_code == 2


def test_files_of_one_name_and_missing_ones(cvxq: Cvxq, model_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / model_file.name
    other.parent.mkdir()
    other.write_bytes(model_file.read_bytes())
    refused = cvxq("serve", model_file, other)
    assert refused.exit_code == 2
    assert f"two models are called {model_file.stem}" in refused.output
    assert cvxq("serve", tmp_path / "none.cvxq").exit_code == 3


def test_an_address_that_cannot_be_had(cvxq: Cvxq, model_file: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = cvxq("serve", model_file, "--port", taken.getsockname()[1])
    assert refused.exit_code == 2
    assert "cannot listen on 127.0.0.1" in refused.output

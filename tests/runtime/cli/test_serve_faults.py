"""A server that is killed: it leaves no process, no file and no port behind."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")

import httpx

KILLS = 20  # one in each part of the time, so that none is left out
LONGEST = 120  # seconds that a start may take

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that is loaded")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def ask(port: int, stop: threading.Event, answered: list[tuple[int, float]]) -> None:
    """Stream chats from a server, whenever there is one; tell status and time of each answer."""
    body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 40, "stream": True}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as http:
        while not stop.is_set():
            try:
                response = http.post("/v1/chat/completions", json=body)
                answered.append((response.status_code, time.monotonic()))
            except httpx.HTTPError:
                time.sleep(0.01)


def processes_of(folder: Path) -> list[str]:
    """Processes that have `folder` for temporary files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={folder}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass
    return found


@pytest.mark.slow
def test_a_server_that_is_killed_at_any_moment(
    chat_file: Path, tmp_path: Path, runs: Callable[..., Any]
) -> None:
    """Its next start answers at the same port; what renders templates ends with it."""
    scratch, port, rng = tmp_path / "scratch", free_port(), Random(3)
    scratch.mkdir()
    before, beside = chat_file.read_bytes(), sorted(chat_file.parent.iterdir())
    one = runs("serve", chat_file, "--threads", 1, "--port", port, TMPDIR=str(scratch))
    stop, answered = threading.Event(), []  # type: ignore[var-annotated]
    client = threading.Thread(target=ask, args=(port, stop, answered))
    client.start()
    try:
        longest, ended = 0.5, {"said": ""}
        while not answered:
            assert longest < LONGEST, ended["said"]
            began, longest = time.monotonic(), 2 * longest
            ended = one("kill", longest)
        longest = 2 * (answered[0][1] - began)
        for kill in range(KILLS):
            ended = one("kill", (kill + rng.random()) / KILLS * longest)
            assert ended["code"] == -9, (kill, ended)
            assert "Traceback" not in ended["said"]
    finally:
        stop.set()
        client.join()
    assert {status for status, _ in answered} == {200}
    assert len(answered) > 1
    end = time.monotonic() + 10
    while len(left := processes_of(scratch)) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(left) == 1, left  # the one that all were forked from
    assert not list(scratch.iterdir())
    assert chat_file.read_bytes() == before
    assert sorted(chat_file.parent.iterdir()) == beside

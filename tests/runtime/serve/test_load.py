"""Many clients at once: nothing but 429 goes wrong, and memory stays flat."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from cvxq.serve.server import Limits

CLIENTS = 64
MOST_GROWTH = 24 << 20  # bytes: of threads and connections, not of texts


def resident_bytes() -> int:
    """Return the memory of this process, server and clients."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    pytest.skip("/proc tells no memory here")


def ask(http: httpx.Client, draw: Random) -> int:
    """Send one request of some kind, whole or streamed, some of them left midway; its status."""
    content = f"{draw.randrange(12)} tells a tale of " + "many words " * draw.randrange(30)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
    kind = draw.randrange(4)
    if kind == 0:
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 429 or answer.json()["choices"]
        return answer.status_code
    if kind == 1:
        return http.post("/v1/completions", json={"prompt": content[:9]}).status_code
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        for count, line in enumerate(answer.iter_lines()):
            if kind == 2 and count == 3:
                break  # the client leaves
            if line.startswith("data: {"):
                assert "error" not in json.loads(line.removeprefix("data: "))
        return answer.status_code


def run_clients(url: str, seconds: float) -> Counter[int]:
    """Let all clients ask for so many seconds; how many answers of each status they got."""
    statuses: Counter[int] = Counter()
    lock, end = threading.Lock(), time.monotonic() + seconds

    def one(number: int) -> None:
        draw = Random(number)
        while time.monotonic() < end:
            status = ask(http, draw)
            with lock:
                statuses[status] += 1
            if status == 429:
                time.sleep(0.05)  # sooner than the server asks for

    connections = httpx.Limits(max_connections=CLIENTS)
    with (
        httpx.Client(base_url=url, timeout=60, verify=False, limits=connections) as http,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        list(pool.map(one, range(CLIENTS)))
    return statuses


@pytest.mark.parametrize(
    ("warm", "seconds"), [(1.5, 2.0), pytest.param(8.0, 30.0, marks=pytest.mark.slow)]
)
def test_many_clients_at_once(
    model: Any, serve: Any, until: Any, warm: float, seconds: float
) -> None:
    with serve(model, limits=Limits(waiting=24)) as tiny:
        run_clients(tiny.url, warm)
        before = resident_bytes()
        statuses = run_clients(tiny.url, seconds)
        assert resident_bytes() - before < MOST_GROWTH
        assert set(statuses) == {200, 429}
        assert statuses[200] > CLIENTS / 2
        until(tiny.is_idle)
        assert tiny.chat("Hi")

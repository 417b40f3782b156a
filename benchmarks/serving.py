"""How soon `cvxq serve` answers, how soon it is free again, and what it holds in memory.

    python benchmarks/serving.py model.cvxq [--threads N] [--seconds 30]

Starts the server, asks it as clients do, one at a time and then 64 at once, and ends it.  The last
line is JSON.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import httpx

CLIENTS = 64
LONG_WORDS = 600
REPEATS = 5
SAMPLES = 200  # of the memory, under load


@click.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--seconds", type=float, default=30, show_default=True, help="Of 64 clients at once.")
def main(file: Path, threads: int, seconds: float) -> None:
    """Measure a server of FILE."""
    command = [sys.executable, "-m", "cvxq.cli", "serve", str(file), "--port", "0"]
    limits = httpx.Limits(max_connections=CLIENTS)
    with httpx.Client(timeout=120, limits=limits) as http:  # which takes a while to make
        began = time.monotonic()
        with subprocess.Popen(
            [*command, "--threads", str(threads)], stderr=subprocess.PIPE, text=True
        ) as server:
            try:
                assert server.stderr is not None
                found = re.search(r"at (http://\S+)", server.stderr.readline())
                assert found, server.stderr.read()
                http.base_url = httpx.URL(found[1])
                while not is_there(http):
                    time.sleep(0.005)
                figures: dict[str, Any] = {"start_seconds": time.monotonic() - began}
                figures |= measure(http, server.pid, seconds)
            finally:
                server.terminate()
    for name, value in figures.items():
        click.echo(f"{name:32} {value}")
    click.echo(json.dumps({"file": file.name, "threads": threads, **figures}))


def is_there(http: httpx.Client) -> bool:
    """Whether the server answers."""
    try:
        return http.get("/health").status_code == 200
    except httpx.ConnectError:
        return False


def measure(http: httpx.Client, process: int, seconds: float) -> dict[str, Any]:
    """Return all figures of a running server but its start."""
    fresh = iter(range(1000))

    def new(words: int) -> str:
        return f"Story number {next(fresh)}: " + "the quick brown fox jumps " * (words // 5)

    figures: dict[str, Any] = {
        "first_token_seconds": median(lambda: first_token(http, new(5))),
        "long_prompt_seconds": median(lambda: first_token(http, new(LONG_WORDS))),
    }
    known = new(LONG_WORDS)
    first_token(http, known)
    figures["cached_prompt_seconds"] = median(lambda: first_token(http, known))
    figures["free_after_leaving_seconds"] = median(lambda: free_again(http, new(5)))
    figures["resident_mb"] = resident_mb(process)
    statuses: Counter[int] = Counter()
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        while time.monotonic() < end:
            body = chat(f"Client {number} says hello.", 8)
            status = http.post("/v1/chat/completions", json=body).status_code
            statuses[status] += 1
            if status == 429:
                time.sleep(0.2)

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        watching = pool.submit(watch, process, end, seconds / SAMPLES)
        list(pool.map(client, range(CLIENTS)))
    held = watching.result()
    figures["answers"] = {str(status): count for status, count in sorted(statuses.items())}
    figures["resident_mb_after"] = resident_mb(process)
    figures["in_use_mb_by_tenths"] = [round(max(tenth), 1) for tenth in tenths(held)]
    steady = held[len(held) // 10 :]  # by then every session has been used
    figures["in_use_growth"] = f"{max(steady) / steady[0] - 1:.2%}"
    return figures


def watch(process: int, end: float, pause: float) -> list[float]:
    """Return the megabytes in use at regular moments until the end."""
    held = []
    while time.monotonic() < end:
        held.append(resident_mb(process, "RssAnon"))
        time.sleep(pause)
    return held


def tenths(values: list[float]) -> list[list[float]]:
    """Cut a list into ten parts, or as many as it has values."""
    parts = min(10, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)]
    return [values[low:high] for low, high in itertools.pairwise(edges)]


def chat(content: str, max_tokens: int) -> dict[str, Any]:
    """Return the body of a request."""
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }


def first_token(http: httpx.Client, content: str, max_tokens: int = 1) -> float:
    """Return the seconds until the first piece of an answer; the rest is not waited for."""
    began = time.monotonic()
    body = {**chat(content, max_tokens), "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if '"content"' in line:
                return time.monotonic() - began
    return time.monotonic() - began


def free_again(http: httpx.Client, content: str) -> float:
    """Leave a long answer midway; return the seconds until the decoder is free."""
    first_token(http, content, max_tokens=4000)  # closes the connection
    began = time.monotonic()
    while "cvxq_running 0.0" not in http.get("/metrics").text:
        time.sleep(0.002)
    return time.monotonic() - began


def median(measured: Callable[[], float]) -> float:
    """Return the median of several measurements."""
    return round(statistics.median(measured() for _ in range(REPEATS)), 4)


def resident_mb(process: int, kind: str = "VmRSS") -> float:
    """Return the megabytes of a process that are in memory; RssAnon: without mapped files."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(rf"{kind}:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1000


if __name__ == "__main__":
    main()

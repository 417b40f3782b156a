"""The queue's order and its limits, clients that leave, time that is up."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from cvxq.lean.native_decoder import NativeDecoder
from cvxq.serve.engine import Engine, FairQueue, Job
from cvxq.serve.errors import ApiError
from cvxq.serve.metrics import Metrics
from cvxq.serve.server import Limits
from cvxq.session import Session

Until = Callable[[Callable[[], bool]], float]
ENDLESS = {
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 1900,
    "logit_bias": {"2": -100, "4": -100},  # never the end, of text or of turn
}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each token take at least 3 ms, so that `ENDLESS` takes six seconds."""
    feed = NativeDecoder.feed

    def fed(self: NativeDecoder, ids: Sequence[int]) -> Any:
        time.sleep(0.003)
        return feed(self, ids)

    monkeypatch.setattr(NativeDecoder, "feed", fed)


def test_clients_take_turns() -> None:
    async def order() -> str:
        queue = FairQueue()
        for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
            queue.put(Job(name[0], lambda job, name=name: job.emit(name)))  # type: ignore[misc]
        assert len(queue) == 6
        found = []
        while job := queue.pop():
            job.run()
            found += [event async for event in job]
        return " ".join(found)

    assert asyncio.run(order()) == "a1 b1 c1 a2 b2 a3"


def test_a_job_that_left_is_out_of_the_queue() -> None:
    async def order() -> int:
        queue = FairQueue()
        first, second = (Job("a", lambda job: None) for _ in range(2))
        queue.put(first)
        assert queue.remove(first)
        assert not queue.remove(first)
        queue.put(second)
        assert queue.pop() is second
        return len(queue)

    assert asyncio.run(order()) == 0


def test_one_at_a_time_and_no_more_than_may_wait() -> None:
    async def run() -> None:
        engine = Engine(2, 60, Metrics())
        release, most = threading.Event(), [0, 0]

        def work(job: Job) -> None:
            most[0] += 1
            most[1] = max(most)
            release.wait(5)
            most[0] -= 1

        jobs = [engine.submit("a", work) for _ in range(3)]
        with pytest.raises(ApiError) as refused:
            engine.submit("b", work)
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        release.set()
        for job in jobs:
            assert [event async for event in job] == []
        assert most[1] == 1
        engine.close()

    asyncio.run(run())


def test_without_a_queue_an_idle_decoder_answers() -> None:
    async def run() -> None:
        engine = Engine(0, 60, Metrics())
        for _ in range(2):
            release = threading.Event()
            job = engine.submit("a", lambda job, release=release: release.wait(5))  # type: ignore[misc]
            with pytest.raises(ApiError):
                engine.submit("b", lambda job: None)
            release.set()
            assert [event async for event in job] == []
            while not engine.is_idle:
                await asyncio.sleep(0.001)
        engine.close()

    asyncio.run(run())


def test_a_failure_reaches_the_one_who_asked_and_nobody_else() -> None:
    async def run() -> list[Any]:
        engine = Engine(5, 60, Metrics())

        def fail(job: Job) -> None:
            raise ZeroDivisionError

        jobs = engine.submit("a", fail), engine.submit("a", lambda job: job.emit(7))
        with pytest.raises(ZeroDivisionError):
            [event async for event in jobs[0]]
        found = [event async for event in jobs[1]]
        engine.close()
        return found

    assert asyncio.run(run()) == [7]


def test_time_that_is_up_ends_running_and_waiting_jobs() -> None:
    async def run() -> None:
        engine = Engine(5, 0.1, Metrics())

        def work(job: Job) -> None:
            while True:
                job.check()
                time.sleep(0.001)

        for job in (engine.submit("a", work), engine.submit("a", work)):
            with pytest.raises(ApiError, match=r"more than 0\.1 seconds") as late:
                [event async for event in job]
            assert late.value.status == 504
        engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.usefixtures("slow")
def test_a_client_that_leaves_frees_the_decoder(tiny: Any, until: Until, stream: bool) -> None:
    left = []
    for _ in range(3):
        with socket.create_connection(tiny.url.removeprefix("http://").split(":")) as client:
            body = json.dumps({**ENDLESS, "stream": stream}).encode()
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            client.sendall(head.encode() + body)
            until(lambda: not tiny.is_idle())
            if stream:
                client.recv(4096)
        left.append(until(tiny.is_idle))
    assert min(left) < 0.3
    assert tiny.chat("Hi")


def test_a_client_that_leaves_the_queue_is_not_answered(
    tiny: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, release = [], threading.Event()

    def draw(self: Session, ids: Any, *_: object) -> Any:
        drawn.append(len(ids))
        release.wait(5)
        yield 2

    monkeypatch.setattr("cvxq.lean.session.LeanSession.draw", draw)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(tiny.chat, "first")
        until(lambda: len(drawn) == 1)
        with pytest.raises(Exception, match="timed out"):
            tiny.http.post("/v1/completions", json={"prompt": "second"}, timeout=0.2)
        until(lambda: len(tiny.server.engine._queue) == 0)
        release.set()
        first.result()
    until(tiny.is_idle)
    assert len(drawn) == 1


def test_a_full_queue_says_when_to_come_back(
    model: Any, serve: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, feed = threading.Event(), NativeDecoder.feed

    def held(self: NativeDecoder, ids: Sequence[int]) -> Any:
        release.wait(60)
        return feed(self, ids)

    monkeypatch.setattr(NativeDecoder, "feed", held)
    short = {**ENDLESS, "max_tokens": 20}
    with serve(model, limits=Limits(waiting=1)) as tiny, ThreadPoolExecutor(2) as pool:
        streams = [
            pool.submit(tiny.http.post, "/v1/chat/completions", json=short) for _ in range(2)
        ]
        until(lambda: len(tiny.server.engine._queue) == 1)
        for path in ("chat/completions", "completions", "responses"):
            body = {"input": "a"} if path == "responses" else {"prompt": "a"}
            body = ENDLESS if path == "chat/completions" else body
            answer = tiny.http.post(f"/v1/{path}", json={**body, "stream": True})
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        release.set()
        assert [stream.result().status_code for stream in streams] == [200, 200]


@pytest.mark.usefixtures("slow")
def test_time_that_is_up_is_told(model: Any, serve: Any) -> None:
    with serve(model, limits=Limits(seconds=0.05)) as tiny:
        answer = tiny.http.post("/v1/chat/completions", json=ENDLESS)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        *_, last = tiny.events("/v1/chat/completions", ENDLESS)
        assert last["error"]["code"] == "timeout"
        tiny.served.end_ids = frozenset()
        tiny.served.turns = replace(tiny.served.turns, end_ids=frozenset())
        *_, last = tiny.events("/v1/responses", {"input": "Hi", "temperature": 0})
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["code"] == "timeout"


@pytest.mark.usefixtures("slow")
def test_the_server_ends_while_it_answers(model: Any, serve: Any, until: Until) -> None:
    with ThreadPoolExecutor(1) as pool, serve(model) as tiny:
        stream = pool.submit(tiny.http.post, "/v1/chat/completions", json=ENDLESS)
        until(lambda: not tiny.is_idle())
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert stream.exception() or stream.result().status_code >= 200

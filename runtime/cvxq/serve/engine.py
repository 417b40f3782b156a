"""One request at a time, in a fair order, in a thread beside the event loop.

Clients take turns: whoever has many requests waiting does not keep another's single one from being
next.  A request whose client has left, or whose time is up, ends before its next token.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cvxq.serve.errors import LIMIT, SERVER, ApiError
from cvxq.serve.metrics import Metrics

_END = object()
_MEMORY = 0.8  # weight of earlier requests in the mean duration


class LeftError(Exception):
    """The client went away; nobody waits for an answer."""


class Job:
    """A request's turn at the decoder; iterating over it gives what `work` emits.

    What `work` raises is raised to whoever iterates.
    """

    def __init__(self, client: str, work: Callable[[Job], None]) -> None:
        """Prepare the turn of `client`, within a running event loop."""
        self.client = client
        self.timer: asyncio.TimerHandle | None = None
        self.submitted = time.monotonic()
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._reason: Exception | None = None

    def emit(self, event: object) -> None:
        """Hand `event` to whoever iterates; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def stop(self, reason: Exception) -> None:
        """Let the next `check` raise `reason`."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Raise what the job was stopped for, if it was."""
        if self._reason is not None:
            raise self._reason

    def run(self) -> None:
        """Do the work, in the decoder's thread."""
        try:
            self.check()
            self._work(self)
        except Exception as error:
            self.emit(error)
        self.emit(_END)

    def give_up(self, reason: Exception) -> None:
        """End the job before it began."""
        self.emit(reason)
        self.emit(_END)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (event := await self._events.get()) is not _END:
            if isinstance(event, Exception):
                raise event
            yield event


class FairQueue:
    """Jobs of several clients; each client's in their order, the clients by turns."""

    def __init__(self) -> None:
        self._lanes: dict[str, deque[Job]] = {}  # the first one is next

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def put(self, job: Job) -> None:
        """Add a job behind its client's others."""
        self._lanes.setdefault(job.client, deque()).append(job)

    def pop(self) -> Job | None:
        """Take the next job, and let its client wait for all others' turns."""
        if not self._lanes:
            return None
        client = next(iter(self._lanes))
        lane = self._lanes.pop(client)
        job = lane.popleft()
        if lane:
            self._lanes[client] = lane
        return job

    def remove(self, job: Job) -> bool:
        """Take a job out; tell whether it was there."""
        lane = self._lanes.get(job.client, deque())
        if job not in lane:
            return False
        lane.remove(job)
        if not lane:
            del self._lanes[job.client]
        return True


class Engine:
    """The decoder's thread and the queue before it; used from one event loop."""

    def __init__(self, most_waiting: int, seconds: float, metrics: Metrics) -> None:
        """Let at most `most_waiting` requests wait, and each take at most `seconds` in all."""
        self.most_waiting = most_waiting
        self.seconds = seconds
        self.metrics = metrics
        self._queue = FairQueue()
        self._thread = ThreadPoolExecutor(1, "decoder")
        self._running: Job | None = None
        self._mean_seconds = 1.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self._running is None and not len(self._queue)

    def submit(self, client: str, work: Callable[[Job], None]) -> Job:
        """Put `work` in the queue; raises ApiError 429 when that is full."""
        if self._running is not None and len(self._queue) >= self.most_waiting:
            wait = math.ceil(self._mean_seconds * (len(self._queue) + 1))
            self.metrics.refused.inc()
            raise ApiError(
                429,
                f"{len(self._queue)} requests are waiting already, as many as may; try again in "
                f"about {wait} seconds",
                kind=LIMIT,
                code="queue_full",
                retry_after=wait,
            )
        job = Job(client, work)
        job.timer = asyncio.get_running_loop().call_later(self.seconds, self._expire, job)
        self._queue.put(job)
        self._start_next()
        return job

    def leave(self, job: Job) -> None:
        """Drop a job that nobody waits for any more; one that has ended is none."""
        self._end(job, LeftError())

    def close(self) -> None:
        """Stop whatever runs or waits, and wait for the thread."""
        while job := self._queue.pop():
            self._end(job, LeftError())
        if self._running is not None:
            self._end(self._running, LeftError())
        self._thread.shutdown()

    def _expire(self, job: Job) -> None:
        message = f"the request took more than {self.seconds:g} seconds; ask for less"
        self._end(job, ApiError(504, message, kind=SERVER, code="timeout"))

    def _end(self, job: Job, reason: Exception) -> None:
        if job.timer is not None:
            job.timer.cancel()
        job.stop(reason)
        if self._queue.remove(job):
            job.give_up(reason)
            self._count()

    def _start_next(self) -> None:
        if self._running is None and (job := self._queue.pop()):
            self._running = job
            began = time.monotonic()
            self.metrics.waiting_seconds.observe(began - job.submitted)
            done = asyncio.get_running_loop().run_in_executor(self._thread, job.run)
            done.add_done_callback(lambda _: self._finished(job, began))
        self._count()

    def _finished(self, job: Job, began: float) -> None:
        seconds = time.monotonic() - began
        self._mean_seconds = _MEMORY * self._mean_seconds + (1 - _MEMORY) * seconds
        self.metrics.running_seconds.observe(seconds)
        if job.timer is not None:
            job.timer.cancel()
        self._running = None
        self._start_next()

    def _count(self) -> None:
        self.metrics.waiting.set(len(self._queue))
        self.metrics.running.set(self._running is not None)

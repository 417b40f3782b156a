"""What the routes of one server share: models, engine, and how answers are sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.requests import Request

from cvxq.serve.engine import Engine, Job
from cvxq.serve.errors import ApiError, as_api_error
from cvxq.serve.metrics import Metrics
from cvxq.serve.served import Served

DONE = "[DONE]"
Outcome = AsyncIterator[Any]  # what a job emits
Events = Callable[[Outcome], AsyncIterator[dict[str, Any] | str]]


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the machine.

    waiting: requests in the queue; seconds: from a request to the end of its answer; body_bytes: of
    a request.
    """

    waiting: int = 64
    seconds: float = 600.0
    body_bytes: int = 8 << 20


@dataclass
class Server:
    """Models by name, and the one decoder that answers for all of them."""

    models: Mapping[str, Served]
    limits: Limits
    metrics: Metrics
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.engine = Engine(self.limits.waiting, self.limits.seconds, self.metrics)

    def find(self, name: str | None) -> Served:
        """Return the model of a request; the only one may go without its name."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise ApiError(400, f"model is missing; served are {self._names()}", param="model")
        if name not in self.models:
            raise ApiError(
                404,
                f"there is no model {name!r}; served are {self._names()}",
                code="model_not_found",
                param="model",
            )
        return self.models[name]

    def _names(self) -> str:
        return ", ".join(self.models)

    def submit(self, request: Request, work: Callable[[Job], None]) -> Job:
        """Let `work` wait for its turn; raises ApiError when too many do."""
        return self.engine.submit(request.state.client, work)

    async def answer(
        self, request: Request, job: Job, events: Events | None, whole: Callable[[Outcome], Any]
    ) -> Any:
        """Send what `events` makes of the outcome of `job`, or else what `whole` makes of it."""
        if events is not None:
            return self._stream(job, events)
        return await self._whole(request, job, whole)

    async def _whole(self, request: Request, job: Job, answer: Callable[[Outcome], Any]) -> Any:
        """Return what `answer` makes of the events of `job`, unless the client leaves before."""
        made = asyncio.ensure_future(answer(aiter(job)))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((made, gone), return_when=asyncio.FIRST_COMPLETED)
            if not made.done():
                raise ApiError(499, "the client left; nobody reads this")
            return made.result()
        finally:
            self.engine.leave(job)
            for task in (made, gone):
                task.cancel()

    def _stream(self, job: Job, events: Events) -> EventSourceResponse:
        """Send what `events` makes of the events of `job`; what fails midway is an event, too."""

        async def sent() -> AsyncIterator[ServerSentEvent]:
            try:
                async for event in events(aiter(job)):
                    yield _event(event)
            except Exception as error:
                yield _event(as_api_error(error).body())
            finally:
                self.engine.leave(job)

        return EventSourceResponse(sent(), sep="\n")


def server_of(request: Request) -> Server:
    """Return the server that a request came to."""
    server: Server = request.app.state.server
    return server


def _event(value: dict[str, Any] | str) -> ServerSentEvent:
    """Return an event; an object with a "type" has a name, as /v1/responses wants it."""
    if isinstance(value, str):
        return ServerSentEvent(value, sep="\n")
    name = value.get("type")
    return ServerSentEvent(json.dumps(value, ensure_ascii=False), event=name, sep="\n")


async def _disconnected(request: Request) -> None:
    with contextlib.suppress(Exception):
        while (await request.receive())["type"] != "http.disconnect":
            pass

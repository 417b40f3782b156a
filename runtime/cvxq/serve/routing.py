"""Routes: what a function returns is sent as JSON, and the request's JSON is checked before.

Starlette and pydantic do all of it; a framework around them would double the time to start.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cvxq.serve.errors import ApiError

Body = TypeVar("Body", bound=BaseModel)
Answer = Callable[[Request], Awaitable[Any]]
AnswerTo = Callable[[Body, Request], Awaitable[Any]]


def get(path: str) -> Callable[[Answer], Route]:
    """Return what makes a function of the request a route; it returns a response, or JSON."""
    return lambda function: Route(path, _endpoint(function), methods=["GET"])


def post(path: str, schema: type[Body]) -> Callable[[AnswerTo[Body]], Route]:
    """Return what makes a function of a body by `schema`, and the request, a route."""

    def decorate(function: AnswerTo[Body]) -> Route:
        async def answer(request: Request) -> Any:
            return await function(schema.model_validate(await _json(request)), request)

        return Route(path, _endpoint(answer), methods=["POST"])

    return decorate


def _endpoint(function: Answer) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        answer = await function(request)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    return endpoint


async def _json(request: Request) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which pages of other sites may not send unasked
        raise ApiError(415, f"the content type is {kind!r}; send application/json")
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not JSON: {error}") from None

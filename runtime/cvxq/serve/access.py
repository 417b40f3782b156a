"""Who may ask, from where, and how much at once; before any route sees the request."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cvxq.serve.errors import DENIED, ApiError, as_api_error
from cvxq.serve.metrics import Metrics

_PORT = re.compile(r":\d+$")


class Access:
    """Checks host, key and size of every request, and counts the answers."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        hosts: Sequence[str] | None,
        open_paths: Sequence[str],
        body_bytes: int,
        metrics: Metrics,
    ) -> None:
        """Guard `app`; hosts: names that the server may be called by, None for any."""
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._hosts = hosts
        self._open_paths = open_paths
        self._body_bytes = body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_answered = False

        async def counted(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start" and not is_answered:
                is_answered = True
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.answers.labels(route, message["status"]).inc()
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
            body = await self._body(receive)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        try:
            await self._app(scope, _replayed(body, receive), counted)
        except Exception as error:
            if is_answered:
                raise
            await as_api_error(error).response()(scope, receive, counted)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = _PORT.sub("", headers.get("host", ""))
        if self._hosts is not None and host.strip("[]") not in self._hosts:
            # A page of another site whose name was pointed here would be let in otherwise.
            raise ApiError(
                403, f"this server is not called {host!r}; use {self._hosts[0]}", kind=DENIED
            )
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        client = scope.get("client") or ("unknown", 0)
        scope.setdefault("state", {})["client"] = (
            f"key {matches.index(True)}" if True in matches else client[0]
        )
        if self._keys and not any(matches) and scope["path"] not in self._open_paths:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                kind=DENIED,
                code="invalid_api_key",
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._body_bytes:
            raise self._too_large()

    async def _body(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b""  # gone already
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._body_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._body_bytes:,} bytes; send less")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body` first."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

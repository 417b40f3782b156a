"""The application: routes, errors, and who may use them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from cvxq.serve import chat, completions, pages, responses, tokens
from cvxq.serve.access import Access
from cvxq.serve.errors import HANDLED
from cvxq.serve.server import Server

ROUTES = (
    chat.chat_completions,
    completions.completions,
    responses.responses,
    tokens.tokenize,
    tokens.detokenize,
    pages.models,
    pages.model,
    pages.health,
    pages.metrics,
    pages.page,
)


def make_app(
    server: Server,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> Starlette:
    """Return the application of `server`.

    keys: any of which a request has to bring, none for all requests; hosts: names that the server
    may be called by, None for any; origins: sites whose pages may read its answers.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        server.engine.close()

    app = Starlette(routes=ROUTES, exception_handlers=HANDLED, lifespan=lifespan)
    app.state.server = server
    app.add_middleware(
        Access,
        keys=keys,
        hosts=hosts,
        open_paths=pages.OPEN,
        body_bytes=server.limits.body_bytes,
        metrics=server.metrics,
    )
    if origins:  # outermost: a browser asks for permission without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app

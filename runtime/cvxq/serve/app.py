"""The application: routes, errors, and who may use them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from cvxq.serve import chat, completions, pages, responses, tokens
from cvxq.serve.access import Access
from cvxq.serve.errors import handle_errors
from cvxq.serve.server import Server


def make_app(
    server: Server,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """Return the application of `server`.

    keys: any of which a request has to bring, none for all requests; hosts: names that the server
    may be called by, None for any; origins: sites whose pages may read its answers.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.engine.close()

    app = FastAPI(
        title="cvxq", version=_version(), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.server = server
    for part in (chat, completions, responses, tokens, pages):
        app.include_router(part.router)
    handle_errors(app)
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


def _version() -> str:
    try:
        return version("cvxq")
    except PackageNotFoundError:
        return "0"

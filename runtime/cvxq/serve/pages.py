"""What is there to look at: models, health, counters, and a page to chat with."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from cvxq.serve.metrics import CONTENT_TYPE
from cvxq.serve.routing import get
from cvxq.serve.served import Served
from cvxq.serve.server import server_of

PAGE = Path(__file__).with_name("page.html")
OPEN = ("/", "/health")  # to whoever has no key


@get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List the models."""
    return {"object": "list", "data": [_model(m) for m in server_of(request).models.values()]}


@get("/v1/models/{name}")
async def model(request: Request) -> dict[str, Any]:
    """Describe one model."""
    return _model(server_of(request).find(request.path_params["name"]))


@get("/health")
async def health(_: Request) -> dict[str, str]:
    """Say that the server is there."""
    return {"status": "ok"}


@get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the counters as Prometheus reads them."""
    return Response(server_of(request).metrics.text(), media_type=CONTENT_TYPE)


@get("/")
async def page(_: Request) -> HTMLResponse:
    """Return the page."""
    text, policy = _page()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    """Return the page, and a policy that lets nothing but its own script and style run."""
    text = PAGE.read_text("utf-8")
    digests = {}
    for tag in ("script", "style"):
        inner = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inner is not None
        digest = hashlib.sha256(inner[1].encode()).digest()
        digests[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return text, (
        f"default-src 'none'; script-src {digests['script']}; style-src {digests['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "cvxq",
        "max_model_len": served.model.context_length,
    }

"""Serve loaded models until interrupted."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence

import uvicorn
from starlette.applications import Starlette

from cvxq.errors import ArgumentError
from cvxq.model import Model
from cvxq.serve import LOOPBACK
from cvxq.serve.app import make_app
from cvxq.serve.metrics import Metrics
from cvxq.serve.served import Served
from cvxq.serve.server import Limits, Server

_GRACE = 1  # seconds that answers have to end when the server does
_KEPT = 75  # seconds that an idle connection is kept: longer than clients keep theirs


def run(
    models: Mapping[str, Model],
    *,
    host: str,
    port: int,
    keys: Sequence[str],
    origins: Sequence[str],
    waiting: int,
    seconds: float,
    sessions: int,
    say: Callable[[str], None],
) -> None:
    """Listen and answer; `say` gets the address once the server is there.

    port 0 takes a free one.  Raises ArgumentError for an address that cannot be had.
    """
    # Or the first request waits until all installed packages were asked for plugins of pydantic.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    listening = _listen(host, port)
    metrics = Metrics()
    served = {name: Served(name, model, sessions, metrics) for name, model in models.items()}
    server = Server(served, Limits(waiting=waiting, seconds=seconds), metrics)
    hosts = LOOPBACK if host in LOOPBACK else None
    app = make_app(server, keys=keys, hosts=hosts, origins=origins)
    name = f"[{host}]" if ":" in host else host
    say(f"serving {', '.join(served)} at http://{name}:{listening.getsockname()[1]}")
    worker(app).run([listening])


def worker(app: Starlette) -> uvicorn.Server:
    """Return what serves `app` on sockets that listen."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        ws="none",
        access_log=False,
        timeout_keep_alive=_KEPT,
        timeout_graceful_shutdown=_GRACE,
    )
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ArgumentError(
            f"cannot listen on {host}, port {port}: {reason}; name others with --host and --port"
        ) from None
    listening.setblocking(False)
    return listening

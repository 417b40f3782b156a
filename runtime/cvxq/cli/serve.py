"""`cvxq serve`: the OpenAI API, and a page to chat with, on one machine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from cvxq.cli.failures import FileProblem, existing_file
from cvxq.cli.options import (
    context_option,
    load_model,
    model_file,
    model_name,
    running_options,
)
from cvxq.extras import need
from cvxq.rendering import begin
from cvxq.serve import LOOPBACK


@click.command("serve", short_help="Answer the OpenAI API, and show a page to chat with.")
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; any but this machine's own needs a key.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    metavar="KEY",
    help="Refuse requests without it; @FILE reads one per line.",
)
@click.option("--no-key", is_flag=True, help="Let everybody in who reaches --host.")
@click.option(
    "--cors",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this site read answers, e.g. https://chat.example.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Requests that may wait; further ones are told to come back.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600,
    show_default=True,
    help="Seconds for a request, waiting included.",
)
@click.option(
    "--sessions",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Texts of a model that are kept to go on from.",
)
@context_option
@running_options  # fmt: skip
def command(
    files: tuple[str, ...],
    host: str,
    port: int,
    keys: tuple[str, ...],
    no_key: bool,
    origins: tuple[str, ...],
    queue: int,
    timeout: float,
    sessions: int,
    context: int | None,
    weights: str,
    device: str,
    threads: int | None,
) -> None:
    """Answer the OpenAI API with the models in FILES, and show a page to chat with.

    A model is called by its file's name without .cvxq, or its repository's. Requests are answered
    one after the other, clients by turns; the page is at the address that is printed. Ctrl-C ends
    the server.

    \b
    Example:
      cvxq serve model.cvxq --port 8000
    """
    need("serve", "serve")
    secrets = _keys(keys)
    if host not in LOOPBACK and not secrets and not no_key:
        raise click.UsageError(
            f"--host {host} lets other machines in; give --api-key KEY, or --no-key to let "
            "everybody in"
        )
    names = [model_name(file) for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise click.UsageError(f"two models are called {twice}; rename the file of one")
    paths = [model_file(file) for file in files]
    begin()
    with _undisturbed():
        # Not beside the imports below: threads that share one interpreter would take longer.
        models = {
            name: load_model(path, weights, device, threads, context)
            for name, path in zip(names, paths, strict=True)
        }
        from cvxq.serve.run import run

    run(
        models,
        host=host,
        port=port,
        keys=secrets,
        origins=origins,
        waiting=queue,
        seconds=timeout,
        sessions=sessions,
        say=lambda text: click.echo(text, err=True),
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Look for no garbage meanwhile: starting leaves next to none."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _keys(given: tuple[str, ...]) -> list[str]:
    """Return the keys, those of files read; raises FileProblem for a file without any."""
    keys: list[str] = []
    for text in given:
        if not text.startswith("@"):
            keys.append(text)
            continue
        path = existing_file(Path(text[1:]), "a text file with a key per line")
        found = path.read_text("utf-8").split()
        if not found:
            raise FileProblem(f"{path} has no key in it, expected one per line")
        keys += found
    if not all(keys):
        raise click.UsageError("--api-key is empty; give a key, or leave it out")
    return keys

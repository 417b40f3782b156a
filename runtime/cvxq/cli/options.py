"""Options that several subcommands share, and what their values turn into."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from cvxq.cli.failures import existing_file

if TYPE_CHECKING:
    from cvxq.model import Model
    from cvxq.sample import SamplingSettings

Function = TypeVar("Function", bound=Callable[..., Any])

_SAMPLING = (
    click.option("--temperature", type=float, default=0.7, show_default=True,
                 help="0 always takes the likeliest token."),
    click.option("--top-k", type=int, default=0, help="Keep the K likeliest tokens; 0 keeps all."),
    click.option("--top-p", type=float, default=1.0,
                 help="Keep the likeliest tokens that together reach P."),
    click.option("--min-p", type=float, default=0.0,
                 help="Drop tokens below P times the likeliest one's probability."),
    click.option("--repetition-penalty", type=float, default=1.0,
                 help="Above 1 makes tokens that occurred less likely."),
    click.option("--seed", type=int, help="Draw the same tokens every time."),
    click.option("--stop", multiple=True, metavar="TEXT",
                 help="End before this text; may be given several times."),
)  # fmt: skip
_RUNNING = (
    click.option("--weights", type=click.Choice(["packed", "dense"]), default="packed",
                 show_default=True, help="Keep matrices packed in memory, or expand them once."),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
    click.option("--threads", type=click.IntRange(min=1),
                 help="CPU threads; default: as many as help."),
)  # fmt: skip
_CONTEXT = (
    click.option("--context", type=click.IntRange(min=2), metavar="N",
                 help="Tokens of a text; default: as many as the model was made for."),
)  # fmt: skip
_SHIFT = (
    click.option("--shift", is_flag=True,
                 help="When the context is full, drop the oldest half of the text and go on."),
)  # fmt: skip


def sampling_options(function: Function) -> Function:
    """Add the options of `SamplingSettings`, `max_tokens` left to the subcommand."""
    return _apply(_SAMPLING, function)


def running_options(function: Function) -> Function:
    """Add how weights are held, where they compute and how many threads do."""
    return _apply(_RUNNING, function)


def context_option(function: Function) -> Function:
    """Add how long a text may be."""
    return _apply(_CONTEXT, function)


def shift_option(function: Function) -> Function:
    """Add what happens when the context is full."""
    return _apply(_SHIFT, function)


def _apply(options: tuple[Callable[[Any], Any], ...], function: Function) -> Function:
    for option in reversed(options):
        function = option(function)
    return function


def sampling_settings(options: dict[str, Any], max_tokens: int | None) -> SamplingSettings:
    """Check the sampling options; raises ArgumentError naming the one out of range."""
    from cvxq.sample import SamplingSettings

    return SamplingSettings(max_tokens=max_tokens, **options)


def model_file(text: str) -> Path:
    """Return the `.cvxq` file that a command's FILE names: a path, or one of the hub, downloaded.

    Raises FileProblem for a path that is no file, HubError where the hub does not give the file.
    """
    from cvxq.hub import fetch, hub_file

    wanted = hub_file(text)
    return existing_file(Path(text), "a .cvxq file") if wanted is None else fetch(wanted)


def model_name(text: str) -> str:
    """Return what to call the model that FILE names: the file without .cvxq, or the repository."""
    from cvxq.hub import hub_file

    wanted = hub_file(text)
    return Path(text).stem if wanted is None else wanted.name


def load_model(
    file: Path,
    weights: str,
    device: str,
    threads: int | None,
    context: int | None = None,
    tokenizer: bool = True,
) -> Model:
    """Load a `.cvxq` file, and its tokenizer beside the weights unless it is not wanted.

    Says in one line each on stderr when transformers has to run the model, and why, and when the
    context is longer than the model was made for.
    """
    quiet_transformers()
    from cvxq.loading import load

    held: Literal["packed", "dense"] = "packed" if weights == "packed" else "dense"
    model = load(
        file, weights=held, device=device, threads=threads, context=context, tokenizer=tokenizer
    )
    say_path(file, model.transformers_reason)
    full = None if context is None else model.full_context
    if context is not None and full is not None and context > full:
        click.echo(
            f"--context {context} is more than the {full} tokens that the model was made for; "
            "past them its text may get worse",
            err=True,
        )
    return model


def full_text(context: int | None) -> str:
    """Say that the context is full, and what can be done."""
    return (
        f"the context of {context} tokens is full, so the text ends here; --context N gives it "
        "more, --shift goes on without the oldest half"
    )


def say_path(file: Path, transformers_reason: str | None) -> None:
    """Say that transformers runs the model, if there is a reason to tell."""
    if transformers_reason is not None:
        click.echo(f"{file} runs through transformers: {transformers_reason}", err=True)


def quiet_transformers() -> None:
    """Keep the notices of transformers off stderr, whether it is loaded already or will be."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

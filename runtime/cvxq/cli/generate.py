"""`cvxq generate`: continue a prompt, streaming the text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvxq.cli.failures import decoded, read_text
from cvxq.cli.options import (
    context_option,
    full_text,
    load_model,
    model_file,
    running_options,
    sampling_options,
    sampling_settings,
    shift_option,
)

if TYPE_CHECKING:
    from cvxq.generate import Generation


@click.command("generate", short_help="Continue a prompt, streaming the text to stdout.")
@click.argument("file")
@click.argument("prompt", required=False)
@click.option(
    "--file", "-f", "prompt_file", type=click.Path(path_type=Path), help="Read the prompt here."
)
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Generate at most N.")
@sampling_options
@context_option
@shift_option
@running_options
def command(
    file: str,
    prompt: str | None,
    prompt_file: Path | None,
    max_tokens: int,
    context: int | None,
    shift: bool,
    weights: str,
    device: str,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in FILE; the text goes to stdout, its speed to stderr.

    Without PROMPT and --file, or with PROMPT "-", the prompt is read from stdin. One line break
    at the end of a prompt from a file or stdin is dropped. The prompt itself is not printed.

    \b
    Example:
      cvxq generate model.cvxq "Once upon a time" --max-tokens 100 --seed 1
    """
    path = model_file(file)
    text = read_prompt(prompt, prompt_file)
    settings = sampling_settings(sampling, max_tokens)
    with load_model(path, weights, device, threads, context) as model:
        clock = Clock()
        session = model.session(shift=shift)
        result = model.generate(text, settings, on_text=clock.write, session=session)
    click.echo()
    click.echo(clock.report(result), err=True)
    if result.finish == "context":
        click.echo(full_text(session.context_length), err=True)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the prompt from the one place that was given; raises UsageError for none or two."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("PROMPT and --file exclude each other; give one")
    if prompt_file is not None:
        return read_text(prompt_file, "a text file with the prompt").removesuffix("\n")
    if prompt is not None and prompt != "-":
        return prompt
    stdin = sys.stdin.buffer
    if prompt is None and stdin.isatty():
        raise click.UsageError("no prompt; give PROMPT, --file or a text on stdin")
    return decoded(stdin.read(), "stdin", "a prompt").removesuffix("\n")


class Clock:
    """Prints text as it comes and remembers when the first of it came."""

    def __init__(self) -> None:
        """Start counting."""
        self._begin = time.perf_counter()
        self._first: float | None = None

    def write(self, piece: str) -> None:
        """Print a piece of text at once."""
        if self._first is None:
            self._first = time.perf_counter()
        sys.stdout.write(piece)
        sys.stdout.flush()

    def report(self, result: Generation) -> str:
        """Return one line: tokens, seconds, tokens/s and why it ended."""
        now = time.perf_counter()
        first = self._first if self._first is not None else now
        count, seconds = len(result.ids), now - self._begin
        reasons = {
            "end": "end of text",
            "stop": "stop text",
            "length": "--max-tokens reached",
            "context": "context full",
        }
        return (
            f"[{len(result.prompt_ids)} prompt tokens, first text after {first - self._begin:.2f} s"
            f"; {count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s"
            f"; {reasons[result.finish]}]"
        )

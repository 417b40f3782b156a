"""Results on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

UNLIMITED_WIDTH = 10_000


def emit_json(record: object, indent: int | None = 2) -> None:
    """Print `record` as strict JSON; numbers that JSON lacks (NaN, infinities) become null."""
    text = json.dumps(_finite(record), indent=indent, ensure_ascii=False, allow_nan=False)
    click.echo("\n".join(map(_printable, text.split("\n"))))


def _printable(line: str) -> str:
    """Return a line of JSON with escapes for what it may hold, but a terminal takes for commands.

    Halves of characters among them, which no terminal can be given.
    """
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def _finite(value: Any) -> Any:
    """Return `value` with every float that is not finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1
) -> None:
    """Print a table; the first `text_columns` are flush left, the numbers after them right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold"
    )
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="left" if index < text_columns else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    is_terminal = sys.stdout.isatty()  # a pipe or a file gets whole lines, whatever their width
    console = Console(
        file=sys.stdout,
        highlight=False,
        markup=False,
        emoji=False,
        width=None if is_terminal else UNLIMITED_WIDTH,
    )
    console.print(table)


def bytes_text(count: int) -> str:
    """Return a number of bytes with its thousands separated."""
    return f"{count:,}"


class Progress:
    """Stages on stderr: one rewritten line on a terminal, else a line per stage and 30 seconds.

    Callable as `progress(stage, done, total)`, the form that every long computation takes.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._stage = ""
        self._stage_began = self._shown = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of `stage` are behind us."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_began, self._shown = stage, now, -math.inf
        ends = done >= total
        if not ends and now - self._shown < (0.1 if self._is_terminal else 30.0):
            return
        self._shown = now
        elapsed = now - self._stage_began
        remaining = f", {elapsed / done * (total - done):.0f} s left" if 0 < done < total else ""
        line = f"{stage}: {done}/{total}, {elapsed:.0f} s{remaining}"
        if self._is_terminal:
            click.echo(f"\r\x1b[K{line}", err=True, nl=ends)
        else:
            click.echo(line, err=True)

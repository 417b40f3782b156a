"""`cvxq verify`: every checksum and invariant of a file, with what it costs."""

from __future__ import annotations

import time
from pathlib import Path

import click
import cvxq_format

from cvxq.cli.failures import CORRUPT, existing_file
from cvxq.cli.output import bytes_text, emit_json


class VerificationFailed(click.ClickException):
    """The file has at least one problem."""

    exit_code = CORRUPT


@click.command("verify", short_help="Check every checksum and invariant of a file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(file: Path, as_json: bool) -> None:
    """Check every checksum, the padding and every invariant of FILE, naming what is wrong.

    The exit code is 0 for a sound file and 4 for one with problems.

    \b
    Example:
      cvxq verify model.cvxq
    """
    size = existing_file(file, "a .cvxq file").stat().st_size
    begin = time.perf_counter()
    with cvxq_format.Reader(file):  # a file that is something else, or of a later version, is no
        problems = cvxq_format.verify(file)  # corrupt file: those errors have their own codes
    seconds = time.perf_counter() - begin
    gigabytes_per_second = size / seconds / 1e9
    if as_json:
        emit_json(
            {
                "sound": not problems,
                "file_bytes": size,
                "seconds": seconds,
                "gigabytes_per_second": gigabytes_per_second,
                "problems": [
                    {"kind": problem.kind, "name": problem.name, "message": problem.message}
                    for problem in problems
                ],
            }
        )
    else:
        for problem in problems:
            click.echo(f"{problem.kind} {problem.name}: {problem.message}")
        if not problems:
            click.echo(
                f"{file}: sound, {bytes_text(size)} bytes in {seconds:.3f} s "
                f"({gigabytes_per_second:.2f} GB/s)"
            )
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise VerificationFailed(f"{file} is corrupt: {count}, the first in {problems[0].name}")

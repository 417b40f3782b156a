"""`cvxq verify`: every checksum and invariant of a file, with what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import cvxq_format

from cvxq.cli.deep import Check, check_claims, check_options, check_record
from cvxq.cli.failures import CORRUPT
from cvxq.cli.options import model_file
from cvxq.cli.output import bytes_text, emit_json


class VerificationFailed(click.ClickException):
    """The file has at least one problem."""

    exit_code = CORRUPT


@click.command("verify", short_help="Check every checksum and invariant of a file.")
@click.argument("file")
@click.option("--deep", is_flag=True, help="Compare the decoder's record with transformers, too.")
@click.option("--against", metavar="MODEL", help="With --deep: measure what FILE says of itself.")
@click.option("--text", type=click.Path(path_type=Path), help="The text FILE was calibrated on.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of --deep.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    file: str,
    deep: bool,
    against: str | None,
    text: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Check every checksum, the padding and every invariant of FILE, naming what is wrong.

    --deep also holds the logits of FILE's own decoder against those of transformers on FILE's own
    weights. --against, the model that FILE was made of, samples its calibration again, compares the
    digest, and measures KL and perplexity again, which have to be within two standard errors of
    what FILE states; that takes as long as calibrating did. The exit code is 0 for a file that is
    what it claims, else 4.

    \b
    Example:
      cvxq verify model.cvxq
      cvxq verify model.cvxq --deep --against path/to/model
    """
    check_options(deep, against, text)
    path = model_file(file)
    size = path.stat().st_size
    begin = time.perf_counter()
    with cvxq_format.Reader(path):  # a file that is something else, or of a later version, is no
        problems = cvxq_format.verify(path)  # corrupt file: those errors have their own codes
    seconds = time.perf_counter() - begin
    gigabytes_per_second = size / seconds / 1e9
    if not as_json:
        for problem in problems:
            click.echo(f"{problem.kind} {problem.name}: {problem.message}")
        if not problems:
            click.echo(
                f"{file}: sound, {bytes_text(size)} bytes in {seconds:.3f} s "
                f"({gigabytes_per_second:.2f} GB/s)"
            )
    checks = []
    for check in _deep_checks(path, deep, against, text, threads) if not problems else ():
        checks.append(check)  # each may take minutes, and is said at once
        if not as_json:
            word = {True: "ok", False: "WRONG", None: "-"}[check.holds]
            click.echo(f"{check.name}: {word}, {check.text}")
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
                "checks": [asdict(check) for check in checks],
            }
        )
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise VerificationFailed(
            f"{file} is corrupt: {count}, the first in {problems[0].name}; copy it again"
        )
    wrong = [check for check in checks if check.holds is False]
    if wrong:
        names = ", ".join(check.name for check in wrong)
        raise VerificationFailed(f"{file} is not what it claims: {names}; do not rely on it")


def _deep_checks(
    file: Path, deep: bool, against: str | None, text: Path | None, threads: int | None
) -> Iterator[Check]:
    if deep:
        yield check_record(file, threads)
    if against is not None:
        yield from check_claims(file, against, text, threads)

"""What `convert` and `measure` have in common: options, threads, how to stop."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from cvxq_kernels.cpu.processors import available_processors

from cvxq.cli.failures import FileProblem, expect_shrinking_files
from cvxq.cli.launch import ranks_here
from cvxq.device import resolve_device
from cvxq.extras import need

Function = TypeVar("Function", bound=Callable[..., Any])

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Size(click.ParamType):
    """A file size such as 12.3MB, as a number of bytes; kB, MB and GB are decimal."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return whole bytes, rounded down; a text of another form fails."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)", str(value).strip().upper())
        if match is None or match[2] not in _UNITS:
            self.fail(
                f"{value!r} is not a size such as 12.3MB; "
                "give a number and B, kB, MB, GB, KiB, MiB or GiB",
                param,
            )
        return int(float(match[1]) * _UNITS[match[2]])


class Percentage(click.ParamType):
    """A share such as 1%, as a number; the sign is required, so that 0.01 cannot be misread."""

    name = "percentage"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the share, 0.01 for 1%; a text of another form fails."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*%", str(value).strip())
        if match is None or float(match[1]) == 0:
            self.fail(
                f"{value!r} is not a percentage above 0, such as 1%; the sign is needed", param
            )
        return float(match[1]) / 100


class Duration(click.ParamType):
    """A time such as 30m, as a number of seconds; the unit is required."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return seconds; a text of another form, or no time at all, fails."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([smh])", str(value).strip().lower())
        if match is None or float(match[1]) == 0:
            self.fail(f"{value!r} is not a time such as 30m; give a number and s, m or h", param)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


_MEASURING = (
    click.option("--keep", multiple=True, metavar="PATTERN",
                 help="Leave these matrices in 16 bits, e.g. '*embed*'."),
    click.option("--calibration", default="self", show_default=True,
                 help="self, copy, none, FILE.txt or FILE.jsonl."),
    click.option("--time", type=Duration(),
                 help="To calibrate, and to tune, on a CPU; default: 5m for up to 135 M weights."),
    click.option("--sequences", type=click.IntRange(min=1), help="Calibration sequences."),
    click.option("--length", type=click.IntRange(min=2), help="Tokens per sequence."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                 help="Of all that is drawn."),
    click.option("--metric", type=click.Choice(["kl", "logits"]), default="kl", show_default=True,
                 help="Loss that is measured: KL, or squared errors of the logits."),
    click.option("--group-size", type=click.IntRange(1, 65536), help="Rows per cluster."),
    click.option("--partitions", type=click.IntRange(min=1), help="Row partitions for splitting."),
    click.option("--revision", help="Branch, tag or commit of a hub id."),
    click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
                 default="float32", show_default=True, help="Type to compute in."),
    click.option("--threads", type=click.IntRange(min=1),
                 help="CPU threads; default: all cores allowed."),
    click.option("--memory", type=Size(), help="At most, e.g. 8GB; default: what is free."),
    click.option("--disk", type=Size(), help="For temporary files, e.g. 50GB."),
    click.option("--scratch", type=click.Path(path_type=Path, exists=True, file_okay=False),
                 metavar="FOLDER", help="Of temporary files; default: that of the output."),
    click.option("--ranks", type=click.IntRange(min=1),
                 help="Processes on this machine that share the work."),
    click.option("--resume/--no-resume", default=True, show_default=True,
                 help="Go on where the same command was interrupted."),
)  # fmt: skip


def measuring_options(function: Function) -> Function:
    """Add the options that say what to measure, on what, and where to compute."""
    for option in reversed(_MEASURING):
        function = option(function)
    return function


def explicit(choices: dict[str, Any]) -> dict[str, Any]:
    """Those choices that were made on the command line, rather than by a default."""
    source = click.get_current_context().get_parameter_source
    return {n: v for n, v in choices.items() if source(n) is not ParameterSource.DEFAULT}


def conversion_options(choices: dict[str, Any]) -> Any:
    """The converter's options; a dtype may be given by its name.

    Raises UsageError for what no conversion can be asked for, such as 9 bits per weight, and
    UnsupportedModelError for a device that is not here.
    """
    import torch
    from cvxq_converter.errors import ConversionError
    from cvxq_converter.options import ConversionOptions

    resolve_device(choices.get("device", "cpu"))
    if "dtype" in choices:
        choices = {**choices, "dtype": getattr(torch, choices["dtype"])}
    try:
        return ConversionOptions.of(**choices)
    except ConversionError as error:
        raise click.UsageError(str(error)) from error


def prepare(threads: int | None, ranks: int | None = None) -> None:
    """Set the threads, quieten transformers, and let `kill` unwind like Ctrl-C.

    ranks: processes that share the processors where no number of threads is given.
    Raises MissingExtraError without the packages that converting needs.
    """
    need("convert", str(click.get_current_context().info_name))
    import transformers

    from cvxq.threads import set_torch_threads

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    here = ranks_here(ranks)
    set_torch_threads(threads or (max(1, available_processors() // here) if here > 1 else None))
    signal.signal(signal.SIGTERM, _stop)
    expect_shrinking_files()


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind, so that the unfinished file is removed."""
    raise KeyboardInterrupt


def announce(line: str) -> None:
    """Say a line on stderr."""
    click.echo(line, err=True)


def refuse_output(path: Path) -> None:
    """Raise FileProblem for a file that cannot be written, before the work that it is to hold."""
    if path.is_dir():
        raise FileProblem(f"{path} is a folder, expected the name of a file to write")
    if not path.absolute().parent.is_dir():
        raise FileProblem(f"{path}: its folder does not exist; create it first")
    refuse_closed(path, path.absolute().parent)


def refuse_closed(path: Path, folder: Path) -> None:
    """Raise FileProblem if `path` cannot be written to its folder, or where that is to be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise FileProblem(f"{path}: Permission denied to write to {there}; name another folder")

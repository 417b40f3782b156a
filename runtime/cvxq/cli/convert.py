"""`cvxq convert`: options in, progress and a closing table out; the work is the converter's."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from cvxq.cli.failures import FileProblem
from cvxq.cli.options import set_threads
from cvxq.cli.output import Progress, bytes_text, print_table

if TYPE_CHECKING:
    from cvxq_converter.report import ConversionReport

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
            self.fail(f"{value!r} is not a size such as 12.3MB, 850kB, 1.5GiB or 123456B", param)
        return int(float(match[1]) * _UNITS[match[2]])


@click.command("convert", short_help="Compress a Hugging Face model into one .cvxq file.")
@click.argument("model")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE")
@click.option("--bits", type=float, help="Bits per weight, side information included, 0 to 8.")
@click.option("--size", "size_bytes", type=Size(), help="Size of the file, e.g. 12.3MB.")
@click.option("--keep", multiple=True, metavar="PATTERN", help="Leave these matrices in 16 bits.")
@click.option(
    "--calibration", default="self", show_default=True, help="self, none, FILE.txt or FILE.jsonl."
)
@click.option("--sequences", type=click.IntRange(min=1), help="Calibration sequences.")
@click.option("--length", type=click.IntRange(min=2), help="Tokens per sequence.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--metric", type=click.Choice(["kl", "logits"]), default="kl", show_default=True)
@click.option("--iterations", type=click.IntRange(min=1), help="Measure and quantize N times.")
@click.option("--method", type=click.Choice(["cvxq", "rtn"]), default="cvxq", show_default=True)
@click.option("--group-size", type=click.IntRange(1, 65536), help="Rows per cluster.")
@click.option("--partitions", type=click.IntRange(min=1), help="Row partitions for splitting.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
    show_default=True, help="Type to compute in.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the report as JSON here.")
def command(
    model: str,
    output: Path,
    bits: float | None,
    size_bytes: int | None,
    dtype: str,
    threads: int | None,
    report: Path | None,
    **choices: Any,
) -> None:
    """Compress MODEL, a folder or a hub id, into one .cvxq file of a chosen rate or size.

    The first line on stderr says what time, memory and disk it will take. The same inputs,
    options, versions, threads and seed give the same file, byte for byte.

    \b
    Example:
      cvxq convert path/to/model -o model.cvxq --bits 3
    """
    if (bits is None) == (size_bytes is None):
        raise click.UsageError("give either --bits or --size")
    for path in (output, report):
        if path is not None and path.is_dir():
            raise FileProblem(f"{path} is a folder, expected the name of a file to write")
    set_threads(threads)
    convert, options = _converter()
    given = {name: value for name, value in choices.items() if value is not None}
    import torch

    chosen = options(bits=bits, size_bytes=size_bytes, dtype=getattr(torch, dtype), **given)
    signal.signal(signal.SIGTERM, _stop)
    result: ConversionReport = convert(model, output, chosen, Progress(), _announce)
    if report is not None:
        report.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    print_table(str(output), ("measure", "value"), closing_rows(result))


def _converter() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Import the converter, which the rest of the runtime does without."""
    from cvxq_converter.job import convert
    from cvxq_converter.options import ConversionOptions

    return convert, ConversionOptions


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind on `kill` as on Ctrl-C, so that the unfinished file is removed."""
    raise KeyboardInterrupt


def _announce(line: str) -> None:
    click.echo(line, err=True)


def closing_rows(report: ConversionReport) -> list[tuple[str, str]]:
    """Return the closing table: rates, sizes, depths, loss and time per stage."""
    rows = [
        (
            "rate, all-in",
            f"{report.rate_bits_per_weight:.4f} bits per weight "
            f"({report.side_bits_per_weight:.4f} of them side information)",
        ),
        (
            "file",
            f"{bytes_text(report.file_bytes)} bytes, "
            f"{report.file_bits_per_parameter:.4f} bits per parameter",
        ),
        (
            "quantized",
            f"{report.quantized_weights:,} of {report.parameters:,} parameters "
            f"in {report.matrices} matrices",
        ),
        ("pruned", f"{report.pruned_share:.2%} of the weights"),
    ]
    shares = enumerate(report.depth_histogram)
    rows += [(f"depth {depth}", f"{share:.2%}") for depth, share in shares if share]
    if report.kl is not None and report.kl_standard_error is not None:
        rows.append(
            (
                "KL to the original",
                f"{report.kl:.5f} ± {report.kl_standard_error:.5f} nats per token",
            )
        )
    rows += [(f"seconds: {stage}", f"{s:.1f}") for stage, s in report.stage_seconds.items()]
    return rows

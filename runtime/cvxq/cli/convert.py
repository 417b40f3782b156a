"""`cvxq convert`: the options of a conversion, its progress and its closing table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvxq.cli.output import Progress, print_table

if TYPE_CHECKING:
    from cvxq_converter.report import ConversionReport

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Size(click.ParamType):
    """A number of bytes such as 12.3MB or 800KiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the size in bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", value)
        try:
            if found:
                return int(float(found[1]) * _UNITS[found[2].upper()])
        except (KeyError, ValueError):
            pass
        self.fail(f"{value!r} is not a size; write it like 12.3MB or 800KiB", param, ctx)


@click.command(short_help="Compress a Hugging Face model into one .cvxq file.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="The .cvxq file to write.",
)
@click.option(
    "--bits",
    type=click.FloatRange(0, 8, min_open=True),
    metavar="R",
    help="Bits per weight of the quantized matrices, all included. Default: 4.",
)
@click.option(
    "--size",
    type=Size(),
    metavar="SIZE",
    help="Size of the whole file instead, for example 12.3MB.",
)
@click.option(
    "--calibration",
    default="self",
    show_default=True,
    metavar="self|FILE|none",
    help="Sampled from the model, a .txt or .jsonl file, or no calibration.",
)
@click.option("--sequences", type=click.IntRange(min=1), help="Calibration sequences.")
@click.option("--length", type=click.IntRange(min=2), help="Tokens per calibration sequence.")
@click.option(
    "--metric",
    type=click.Choice(["kl", "logits"]),
    default="kl",
    show_default=True,
    help="What the result should be close in.",
)
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Measure and quantize again, on the quantized model.",
)
@click.option(
    "--group-size",
    type=click.IntRange(8, 4096),
    metavar="G",
    help="Weights that share a depth and a scale.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN",
    help="Leave matrices of such names in 16 bits, for example '*embed*'.",
)
@click.option(
    "--method",
    type=click.Choice(["cvxq", "rtn"]),
    default="cvxq",
    show_default=True,
    help="rtn: plain rounding, for comparison; --bits is then the codes' depth.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of all random choices.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the computation. Default: float32 on a CPU, else bfloat16.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@click.option("--revision", help="Branch, tag or commit, if MODEL is a hub id.")
@click.option("--report", "report_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Write all figures as JSON.")  # fmt: skip
def command(
    model: str,
    output: Path,
    bits: float | None,
    size: int | None,
    group_size: int | None,
    dtype: str | None,
    device: str,
    threads: int | None,
    report_file: Path | None,
    **chosen: Any,
) -> None:
    """Compress a Hugging Face model into one .cvxq file.

    MODEL is a folder or a hub id. The rate counts everything that the quantized matrices need in
    the file; --size sets the size of the whole file instead.

    \b
    Example:
      cvxq convert path/to/model -o model.cvxq --bits 3
    """
    if bits is not None and size is not None:
        raise click.UsageError("--bits and --size exclude each other; give one of them")
    if output.is_dir():
        raise click.UsageError(f"--output {output} is a folder; name the file to write")
    import torch
    from cvxq_converter.job import convert
    from cvxq_converter.options import GROUP_SIZE, ConversionOptions

    from cvxq.cli.options import set_threads

    set_threads(threads)
    _check_device(device)
    default = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    options = ConversionOptions(
        bits=4.0 if bits is None and size is None else bits,
        size_bytes=size,
        group_size=group_size or GROUP_SIZE,
        dtype=getattr(torch, dtype or default),
        device=device,
        **chosen,
    )
    report = convert(
        model, output, options, Progress(), lambda line: click.echo(f"{model}: {line}", err=True)
    )
    _show(report, output)
    if report_file is not None:
        _write_atomically(report_file, json.dumps(report.to_json(), indent=1) + "\n")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.UsageError(f"--device {device} cannot be used here: {reason}") from None


def _show(report: ConversionReport, output: Path) -> None:
    rows = [
        ("rate", f"{report.rate_bits_per_weight:.3f} bits per weight, all included"),
        ("of which side information", f"{report.side_bits_per_weight:.3f}"),
        ("file", f"{report.file_bytes:,} bytes, {report.file_bits_per_parameter:.3f} per parameter"
         " (bits)"),
        ("quantized", f"{report.quantized_weights:,} weights in {report.matrices} matrices"),
        ("pruned", f"{report.pruned_share:.1%}"),
    ]  # fmt: skip
    if report.kl is not None:
        loss = f"{report.kl:.4f} ± {report.kl_standard_error:.4f} nats per token"
        rows.append(("KL to the original", f"{loss}, on held-back calibration sequences"))
    print_table(str(output), ("", ""), rows, text_columns=2)
    print_table(
        "bit depths",
        [str(depth) for depth in range(9)],
        [[f"{share:.1%}" for share in report.depth_histogram]],
        text_columns=0,
    )
    seconds = report.stage_seconds
    total = sum(seconds.values())
    stages = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    click.echo(f"{total:.1f} s: {stages}")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

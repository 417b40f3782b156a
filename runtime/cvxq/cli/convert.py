"""`cvxq convert`: options in, progress and a closing table out; the work is the converter's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvxq.cli.conversion import (
    Percentage,
    Size,
    announce,
    conversion_options,
    explicit,
    measuring_options,
    prepare,
    refuse_closed,
    refuse_output,
)
from cvxq.cli.failures import FileProblem, existing_file
from cvxq.cli.launch import together
from cvxq.cli.output import Progress, bytes_text, print_table
from cvxq.summary import summarize

if TYPE_CHECKING:
    from cvxq_converter.write.report import ConversionReport

TARGETS = ("bits", "size_bytes", "max_kl", "max_perplexity_increase")


@click.command("convert", short_help="Compress a Hugging Face model into one .cvxq file.")
@click.argument("model")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE")
@click.option("--bits", type=float, help="Bits per weight, side information included, 0 to 8.")
@click.option("--size", "size_bytes", type=Size(), help="Size of the file, e.g. 12.3MB.")
@click.option("--max-kl", type=float, help="Smallest file of at most this KL, nats per token.")
@click.option(
    "--max-perplexity-increase", type=Percentage(), help="Smallest file no worse than, e.g., 1%."
)
@click.option(
    "--statistics", type=click.Path(path_type=Path), metavar="FILE", help="From cvxq measure."
)
@measuring_options
@click.option("--iterations", type=click.IntRange(min=1), help="Measure and quantize N times.")
@click.option(
    "--tune",
    type=click.IntRange(min=0),
    help="Steps that tune scales, norms and codes; default: what --time leaves.",
)
@click.option(
    "--method",
    type=click.Choice(["cvxq", "rtn"]),
    default="cvxq",
    show_default=True,
    help="rtn rounds to nearest, to compare with; its --bits are of codes alone.",
)
@click.option("--report", type=click.Path(path_type=Path), metavar="FOLDER", help="Page and JSON.")
def command(
    model: str,
    output: Path,
    statistics: Path | None,
    threads: int | None,
    report: Path | None,
    resume: bool,
    ranks: int | None,
    **choices: Any,
) -> None:
    """Compress MODEL, a folder, a hub id or a GGUF file, into one .cvxq file.

    Say what you want in one of four ways: --bits, --size, --max-kl or --max-perplexity-increase.
    The first line on stderr says what time, memory and disk it will take. The same inputs,
    options, versions, threads and seed give the same file, byte for byte. --report writes
    index.html, a page to look at, and report.json, the same figures.

    \b
    Example:
      cvxq convert path/to/model -o model.cvxq --bits 3
    """
    given = explicit(choices)
    if sum(name in given for name in TARGETS) != 1:
        raise click.UsageError(
            "give exactly one of --bits, --size, --max-kl and --max-perplexity-increase"
        )
    refuse_output(output)
    if report is not None and report.exists() and not report.is_dir():
        raise FileProblem(f"{report} is a file, expected the name of a folder for the report")
    if report is not None:
        refuse_closed(report, report.absolute())
    if statistics is not None:
        existing_file(statistics, "a file that cvxq measure wrote")
    prepare(threads, ranks)
    measurement = None
    if statistics is not None:
        from cvxq_converter.measure.measurement import load_measurement

        measurement = load_measurement(statistics)
        given = {**measurement.record.options, **given}
    with together(ranks) as who:
        result: ConversionReport = _converter()(
            model,
            output,
            conversion_options(given),
            Progress(),
            announce,
            measurement,
            with_details=report is not None,
            resume=resume,
            ranks=who,
        )
    if not who.is_first:
        return
    if report is not None:
        from cvxq_converter.write.page import write_report

        write_report(report, result.to_json(), summarize(output).record())
        announce(f"report: {report / 'index.html'}")
    print_table(str(output), ("measure", "value"), closing_rows(result))


def _converter() -> Callable[..., Any]:
    """Import the converter, which the rest of the runtime does without."""
    from cvxq_converter.job import convert

    return convert


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
        ("runs", report.decoder.line()),
    ]
    shares = enumerate(report.depth_histogram)
    rows += [(f"depth {depth}", f"{share:.2%}") for depth, share in shares if share]
    if report.kl is not None and report.perplexity_increase is not None:
        error = f" ± {report.kl_standard_error:.5f}" if report.kl_standard_error else ""
        rows += [
            ("KL to the original", f"{report.kl:.5f}{error} nats per token"),
            ("perplexity", f"{report.perplexity_increase:+.2%}"),
        ]
    if report.target is not None:
        target = report.target
        rows.append(
            (
                target.option,
                f"{target.asked:g} asked, {target.achieved:.5g} achieved, {target.trials} trials",
            )
        )
    rows += [(f"seconds: {stage}", f"{s:.1f}") for stage, s in report.stage_seconds.items()]
    return rows

"""`cvxq measure`: what a conversion needs to know of a model, kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvxq.cli.conversion import (
    announce,
    conversion_options,
    explicit,
    measuring_options,
    prepare,
    refuse_output,
)
from cvxq.cli.launch import together
from cvxq.cli.output import Progress, bytes_text, print_table

if TYPE_CHECKING:
    from cvxq_converter.measure.measurement_file import Record


@click.command("measure", short_help="Measure a model once, for many conversions.")
@click.argument("model")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE")
@measuring_options
def command(
    model: str,
    output: Path,
    threads: int | None,
    resume: bool,
    ranks: int | None,
    **choices: Any,
) -> None:
    """Measure MODEL, a folder, a hub id or a GGUF file, and keep what conversions need in a file.

    cvxq convert --statistics uses it and skips calibrating and measuring: it writes the same file
    as without. cvxq plan shows the sizes and losses that can be had.

    \b
    Example:
      cvxq measure path/to/model -o model.stats.safetensors
      cvxq convert path/to/model --statistics model.stats.safetensors --bits 3 -o model.cvxq
    """
    refuse_output(output)
    prepare(threads, ranks)
    from cvxq_converter.job import measure_model

    options = conversion_options({**explicit(choices), "bits": 8})  # the rate plays no part
    if not options.replaces_weights:
        raise click.UsageError(
            "--calibration none leaves nothing to measure, allowed: self, copy or a file of text"
        )
    with together(ranks) as who:
        record = measure_model(model, output, options, Progress(), announce, resume, who)
    if not who.is_first:
        return
    print_table(str(output), ("measure", "value"), closing_rows(record, output.stat().st_size))


def closing_rows(record: Record, file_bytes: int) -> list[tuple[str, str]]:
    """Return the closing table: what was measured, and the losses found at the rates tried."""
    rows = [
        ("model", f"{record.source}, {record.parameters:,} parameters"),
        ("file", f"{bytes_text(file_bytes)} bytes"),
        ("calibration", f"{record.sequences} × {record.length} tokens"),
        ("matrices", f"{len(record.matrices)}, {record.quantized_weights:,} weights"),
    ]
    return rows + [
        (f"KL at {trial.rate_bits_per_weight:g} bits", f"{trial.achieved:.5f} nats per token")
        for trial in record.curve.trials
    ]

"""`cvxq plan`: the rates, sizes and losses that a measured model can be converted to."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvxq.cli.conversion import refuse_output
from cvxq.cli.failures import existing_file
from cvxq.cli.output import bytes_text, emit_json, print_table
from cvxq.extras import need

if TYPE_CHECKING:
    from cvxq_converter.measure.measurement_file import Record

PICTURES = (".png", ".svg")


@click.command("plan", short_help="Show the sizes and losses that a model can have.")
@click.argument("statistics", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it: .png, .svg")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(statistics: Path, plot: Path | None, as_json: bool) -> None:
    """Show what STATISTICS, a file that cvxq measure wrote, promise at every rate.

    Rates count all side information of the quantized matrices, sizes the whole file. The KL is
    that of the measured sensitivities, corrected by trial quantizations; rates that were tried
    show what was found. In a pipe the table is plain, its columns separated by tabs.

    \b
    Example:
      cvxq plan model.stats.safetensors --plot curve.svg
    """
    if plot is not None:
        if plot.suffix.lower() not in PICTURES:
            raise click.UsageError(f"--plot {plot}: its name must end in .png or .svg")
        refuse_output(plot)
        need("plot", "plan --plot")
    from cvxq_converter.measure.measurement_file import read_record

    record = read_record(existing_file(statistics, "a file that cvxq measure wrote"))
    if plot is not None:
        from cvxq_converter.write.plotting import draw_curve

        draw_curve(record, plot)
    entries = curve_entries(record)
    if as_json:
        emit_json({"source": record.source, "parameters": record.parameters, "curve": entries})
    elif sys.stdout.isatty():
        rows = [_cells(entry) for entry in entries]
        print_table(f"{record.source}, {record.parameters:,} parameters", COLUMNS, rows, 0)
    else:
        click.echo("\t".join(entries[0]))
        for entry in entries:
            click.echo("\t".join(_plain(value) for value in entry.values()))


COLUMNS = ("bits/weight", "file bytes", "bits/param.", "KL expected", "perplexity", "KL found")


def curve_entries(record: Record) -> list[dict[str, Any]]:
    """Return the points of the curve, those that were tried among them, by rising rate.

    kl_found is None where nothing was tried. The increase of perplexity is that on text of the
    model's own.
    """
    curve = record.curve
    found = {t.rate_bits_per_weight: t.achieved for t in curve.trials}
    rates = sorted({p.rate_bits_per_weight for p in curve.points} | set(found))
    entries = []
    for rate, kl in zip(rates, curve.loss_at(rates), strict=True):
        size = curve.file_bytes_at(rate)
        entries.append(
            {
                "rate_bits_per_weight": rate,
                "file_bytes": size,
                "file_bits_per_parameter": 8 * size / record.parameters,
                "kl_expected": float(kl),
                "perplexity_increase_expected": math.expm1(kl),
                "kl_found": found.get(rate),
            }
        )
    return entries


def _plain(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    increase, found = entry["perplexity_increase_expected"], entry["kl_found"]
    return (
        f"{entry['rate_bits_per_weight']:.2f}",
        bytes_text(entry["file_bytes"]),
        f"{entry['file_bits_per_parameter']:.3f}",
        f"{entry['kl_expected']:.3g}",
        f"{increase:+.2%}" if increase < 1 else f"×{1 + increase:.3g}",
        "" if found is None else f"{found:.3g}",
    )

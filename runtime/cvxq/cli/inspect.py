"""`cvxq inspect`: where every byte went, depths per matrix, provenance and quality report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click
from cvxq_format.memory import available_memory

from cvxq.cli.failures import printable
from cvxq.cli.options import model_file
from cvxq.cli.output import bytes_text, emit_json, print_table
from cvxq.summary import KINDS, FileSummary, summarize

BAR_WIDTH = 30


@click.command("inspect", short_help="Show where every byte went, depths and provenance.")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(file: str, as_json: bool) -> None:
    """Show where every byte of FILE went, its bit depths, provenance and quality report.

    "All-in" counts everything that the quantized matrices need in the file: codes, depths,
    scales, means, cluster maps, row scales, codebooks and added biases.

    \b
    Example:
      cvxq inspect model.cvxq
    """
    path = model_file(file)
    summary = summarize(path)
    free = available_memory()
    if as_json:
        emit_json({**summary.record(), **memory_record(summary, free)})
        return
    click.echo(f"{file}: {bytes_text(summary.file_bytes)} bytes, {rates_text(summary)}")
    click.echo(printable(f"{path.name} {summary.path_text}"))
    click.echo(f"{context_text(summary, free)}\n")
    _print_bytes(summary)
    if summary.matrices:
        _print_histogram(summary)
        _print_matrices(summary)
    _print_record("provenance", summary.provenance)
    _print_record("quality report", summary.report)


def memory_record(summary: FileSummary, free: int | None) -> dict[str, int | None]:
    """Return free memory, None if unknown, and the largest context that fits beside the weights."""
    fits = None
    if summary.cache is not None and free is not None:
        fits = summary.cache.largest_context(free - summary.file_bytes)
    return {"free_memory_bytes": free, "largest_context_in_free_memory": fits}


def context_text(summary: FileSummary, free: int | None) -> str:
    """Return in words how long texts may be, and what they take."""
    context, cache = summary.reach.context, summary.cache
    texts = [
        "no limit of the context is stated" if context is None else f"context {context:,} tokens"
    ]
    if cache is not None:
        windowed = f", {cache.windowed} with a window of {cache.window:,}" if cache.window else ""
        texts.append(
            f"keys and values take {bytes_text(cache.bytes_per_token)} bytes per token "
            f"(float32, {cache.layers} layers{windowed})"
        )
    fits = memory_record(summary, free)["largest_context_in_free_memory"]
    if fits is not None:
        texts.append(f"free memory holds the weights and {fits:,} tokens")
    return ", ".join(texts)


def rates_text(summary: FileSummary) -> str:
    """Return both rates in words."""
    texts = []
    if summary.rate_bits_per_weight is not None:
        texts.append(
            f"{summary.rate_bits_per_weight:.3f} bits per weight all-in "
            f"({summary.weights:,} weights in {len(summary.matrices)} matrices)"
        )
    if summary.file_bits_per_parameter is not None:
        active = ""
        if summary.active_parameters < summary.parameters:
            active = f", {summary.active_parameters:,} of them for each token"
        texts.append(
            f"whole file {summary.file_bits_per_parameter:.3f} bits per parameter "
            f"({summary.parameters:,} parameters{active})"
        )
    return ", ".join(texts) or "no parameters"


def _print_bytes(summary: FileSummary) -> None:
    rows = []
    for kind, count in summary.bytes_by_kind.items():
        rows.append((KINDS[kind], bytes_text(count), f"{count / summary.file_bytes:.2%}"))
        if kind == "file":
            rows += [
                (f"  {name}{_before(size, summary.original_sizes[name])}", bytes_text(size), "")
                for name, size in summary.carried_files.items()
            ]
    rows.append(("total", bytes_text(summary.file_bytes), "100.00%"))
    print_table("Bytes", ("what", "bytes", "share"), rows)


def _before(size: int, original: int) -> str:
    """The size of a carried file before it was deflated, nothing where it was not."""
    return "" if size == original else f" (deflated from {bytes_text(original)})"


def _print_histogram(summary: FileSummary) -> None:
    largest = max(summary.depth_histogram)
    rows = [
        (
            str(depth),
            "█" * round(BAR_WIDTH * count / largest),
            f"{count:,}",
            f"{count / summary.weights:.2%}",
        )
        for depth, count in enumerate(summary.depth_histogram)
    ]
    print_table("Bit depths", ("depth", "", "weights", "share"), rows, text_columns=2)


def _print_matrices(summary: FileSummary) -> None:
    rows = [
        (
            matrix.name,
            "×".join(map(str, matrix.shape)),
            bytes_text(matrix.payload_bytes),
            f"{matrix.rate_bits_per_weight:.3f}",
            f"{matrix.mean_depth:.3f}",
            "{}–{}".format(*matrix.depth_range),
            f"{matrix.pruned_share:.2%}",
        )
        for matrix in summary.pooled_matrices
    ]
    columns = ("matrix", "shape", "bytes", "bits/weight", "mean depth", "depths", "pruned")
    print_table("Matrices", columns, rows, text_columns=2)


def _print_record(title: str, record: Mapping[str, Any] | None) -> None:
    if record is None:
        click.echo(f"No {title} in the file.")
    else:
        print_table(title.capitalize(), ("entry", "value"), _flat(record), text_columns=2)


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a nested record as (dotted name, text)."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            yield printable(f"{prefix}{key}"), printable(text)

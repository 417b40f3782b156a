"""`cvxq evaluate`: benchmarks, by lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from cvxq.cli.options import load_model, model_file, running_options
from cvxq.cli.output import Progress, emit_json, print_table
from cvxq.extras import need


@click.command("evaluate", short_help="Score benchmarks by lm-evaluation-harness.")
@click.argument("file")
@click.option("--tasks", required=True, metavar="NAME,…", help="Tasks, separated by commas.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Take NAME.jsonl from here, instead of the harness's own tasks.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N documents of each.")
@click.option("--shots", type=click.IntRange(min=0), help="Solved examples before each document.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@running_options
def command(
    file: str,
    tasks: str,
    data: Path | None,
    limit: int | None,
    shots: int | None,
    as_json: bool,
    weights: str,
    device: str,
    threads: int | None,
) -> None:
    """Score FILE on tasks of lm-evaluation-harness, its weights packed.

    Tasks are downloaded by the harness, unless --data names a folder of theirs: a line of
    NAME.jsonl is a document, as the page docs/evaluating.md says. ± is one standard error.

    \b
    Example:
      cvxq evaluate model.cvxq --tasks arc_easy,hellaswag --limit 200
    """
    need("eval", "evaluate")
    path = model_file(file)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    chosen: list[Any] = list(names)
    if data is not None:
        from cvxq.documents import tasks_of

        chosen = tasks_of(data, names)
    _quiet_harness()
    from cvxq.harness import HarnessModel, evaluate

    with (
        load_model(path, weights, device, threads) as model,
        contextlib.redirect_stdout(sys.stderr),  # the harness prints, too
    ):
        results = evaluate(HarnessModel(model, Progress()), chosen, limit, shots)
    rows = list(_rows(results))
    if as_json:
        keys = ("task", "metric", "value", "standard_error", "documents")
        emit_json({"model": file, "results": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    texts = [
        (task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", str(count))
        for task, metric, value, error, count in rows
    ]
    print_table("", ("task", "measure", "value", "±", "documents"), texts, text_columns=2)


def _quiet_harness() -> None:
    """Leave telling how far it is to our own progress."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")


def _rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None, int | None]]:
    """Yield task, metric, value, standard error and documents of each figure."""
    for task, figures in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            yield task, metric, value, error if isinstance(error, int | float) else None, count

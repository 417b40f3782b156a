"""How many questions of benchmarks a model answers, and the files that were made of it: one table.

    pip install 'cvxq[eval,convert]'
    python benchmarks/tasks.py --original FOLDER --data DOCUMENTS --limit 100 FILE.cvxq ...

DOCUMENTS holds TASK.jsonl for each task, as docs/evaluating.md says.  Files are asked as `cvxq
evaluate` does.  So is the original, and so are peers: folders with the matrices.safetensors that
benchmarks/quality.py had one make of this original (in its --peers folder, under work/peers).  Of
both a file in 16 bits is made first, of which the smallest matrix has 8.  What was found is kept in
--results, a line for each model and task, and not asked again.  Of ARC-challenge and HellaSwag
acc_norm is shown, as is usual, of GSM8K exact_match, of the others acc.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import cvxq
import torch
from cvxq.documents import tasks_of
from cvxq.harness import HarnessModel, evaluate
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import load_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")
MATRICES = "matrices.safetensors"
BY_LENGTH = ("arc_challenge", "hellaswag")  # whose acc_norm is usually told


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--original", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--tasks", default=",".join(TASKS), show_default=True)
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("tasks.jsonl"))
def main(
    files: Sequence[Path],
    original: Path | None,
    data: Path,
    tasks: str,
    limit: int,
    threads: int,
    results: Path,
) -> None:
    """Ask the original and FILES, and print the table."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = tasks.split(",")
    models = [*([original] if original else []), *files]
    known = kept(results)
    for model in models:
        missing = [name for name in names if (model.name, name, limit) not in known]
        if not missing:
            continue
        with contextlib.redirect_stdout(sys.stderr), opened(model, original, threads) as asked:
            for name in missing:
                began = time.monotonic()
                found = evaluate(asked, tasks_of(data, [name]), limit, None)
                row = {
                    "model": model.name,
                    "task": name,
                    "limit": limit,
                    "documents": found["n-samples"][name]["effective"],
                    "seconds": round(time.monotonic() - began, 1),
                    **{k: v for k, v in found["results"][name].items() if "," in k},
                }
                with results.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
    known = kept(results)
    for line in table([model.name for model in models], names, limit, known):
        click.echo(line)


def kept(results: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return what earlier runs found, by model, task and limit."""
    if not results.exists():
        return {}
    rows = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    return {(row["model"], row["task"], row["limit"]): row for row in rows}


@contextlib.contextmanager
def opened(model: Path, original: Path | None, threads: int) -> Iterator[HarnessModel]:
    """Give the harness's view of a file, of the original's folder, or of what a peer made of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = model if model.is_file() else in_16_bits(model, original, Path(folder))
        with cvxq.load(file, threads=threads) as loaded:
            yield HarnessModel(loaded)


def in_16_bits(model: Path, original: Path | None, folder: Path) -> Path:
    """Make a file of all weights in 16 bits; a conversion leaves one matrix to quantize, though."""
    if (model / MATRICES).exists():
        if original is None:
            raise click.UsageError(f"{model} holds matrices alone; name the model with --original")
        model = merged(original, load_file(model / MATRICES), folder / "merged")
    options = ConversionOptions.of(bits=8, calibration="none")
    sizes = {
        m.name: m.weight.numel() for m in load_model(open_source(str(model)), options).matrices
    }
    smallest = min(sizes, key=sizes.__getitem__)
    kept = tuple(glob.escape(name) for name in sizes if name != smallest)
    file = folder / "model.cvxq"
    convert(str(model), file, options.having(keep=kept))
    return file


def merged(original: Path, matrices: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write the original with some matrices in place of its own."""
    network = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    extra = network.load_state_dict(matrices, strict=False).unexpected_keys
    if extra:
        raise click.UsageError(f"{extra[0]} is no matrix of {original}")
    network.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    return folder


def table(
    models: Sequence[str],
    names: Sequence[str],
    limit: int,
    known: dict[tuple[str, str, int], dict[str, Any]],
) -> Iterator[str]:
    """Yield the lines of a Markdown table: percent of the documents, ± one standard error."""
    yield f"| | {' | '.join(names)} | mean |"
    yield f"|---|{'---:|' * (len(names) + 1)}"
    counts = [str(known[models[0], name, limit]["documents"]) for name in names]
    yield f"| documents | {' | '.join(counts)} | |"
    for model in models:
        values = [percent(name, known[model, name, limit]) for name in names]
        mean = sum(value for value, _ in values) / len(values)
        error = sum(error**2 for _, error in values) ** 0.5 / len(values)
        texts = [f"{value:.1f} ± {error:.1f}" for value, error in [*values, (mean, error)]]
        yield f"| {model} | {' | '.join(texts)} |"


def percent(name: str, row: dict[str, Any]) -> tuple[float, float]:
    """What is usually told of a task, and its standard error; of answers, how many are right."""
    metric, kind = "acc_norm" if name in BY_LENGTH else "acc", "none"
    if "exact_match,last-number" in row:
        metric, kind = "exact_match", "last-number"
    return 100 * row[f"{metric},{kind}"], 100 * row[f"{metric}_stderr,{kind}"]


if __name__ == "__main__":
    main()

"""`cvxq perplexity`: perplexity of a text, and divergence from the original model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvxq.cli.failures import FileProblem, read_text
from cvxq.cli.inspect import rates_text
from cvxq.cli.options import running_options
from cvxq.cli.output import Progress, emit_json, print_table
from cvxq.cli.subject import cvxq_file, load_subject
from cvxq.summary import FileSummary, summarize

if TYPE_CHECKING:
    from cvxq.evaluate import DivergenceResult, Estimate, PerplexityResult

LONGEST_CONTEXT = 2048  # tokens; what published tables use unless they say otherwise
START_TOKENS = {
    "every window": "each beginning with the start token",
    "text": "the start token at the beginning of the text alone",
    "none": "without a start token, since the tokenizer adds none",
}


@click.command("perplexity", short_help="Measure perplexity, and KL to the original.")
@click.argument("model")
@click.option(
    "--text", "text_file", required=True, type=click.Path(path_type=Path), help="UTF-8 text."
)
@click.option("--context", type=int, help="Tokens per window; default: the model's, 2048 at most.")
@click.option("--stride", type=int, help="Tokens between windows; default: end to end.")
@click.option("--windows", "most", type=click.IntRange(min=1), help="Only the first N windows.")
@click.option("--no-bos", is_flag=True, help="A start token at the beginning of the text alone.")
@click.option("--against", metavar="ORIGINAL", help="To compare with, like MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@running_options
def command(
    model: str,
    text_file: Path,
    context: int | None,
    stride: int | None,
    most: int | None,
    no_bos: bool,
    against: str | None,
    as_json: bool,
    weights: str,
    device: str,
    threads: int | None,
) -> None:
    """Measure the perplexity of MODEL, a .cvxq or GGUF file, a folder or a hub id, on a text.

    The text is tokenized once and cut into windows. If the tokenizer adds a start token (BOS),
    every window begins with it, within its context, and scores all tokens that follow; else, and
    with --no-bos (as in most published tables), each scores all tokens but its first.
    --against adds the divergence of the next-token distributions from the original's: KL in nats
    per token, and how often both find the same token likeliest. ± is one standard error.

    \b
    Example:
      cvxq perplexity model.cvxq --text wiki.test.raw --against path/to/model
    """
    text = read_text(text_file, "a text file")
    from cvxq_format.text import start_tokens

    from cvxq import evaluate
    from cvxq.tokenizer import check_tokens

    subject = load_subject(model, weights, device, threads)
    file = cvxq_file(model)
    summary = None if file is None else summarize(file)
    context = context or min(subject.context_length or LONGEST_CONTEXT, LONGEST_CONTEXT)
    _check_context(context, subject.context_length)
    tokenizer = subject.read_tokenizer()
    added = start_tokens(tokenizer)
    start = [] if no_bos else added
    ids = evaluate.token_ids(tokenizer, text, with_special_tokens=not start)
    check_tokens(ids, subject.vocabulary, tokenizer)
    if len(ids) < 2:
        raise FileProblem(f"{text_file}: {len(ids)} tokens, at least 2 are needed to score one")
    every = evaluate.windows(ids, context, stride, start)
    windows = every[:most]
    progress = Progress()
    setting = {
        "context": context,
        "stride": stride or context - len(start),
        "windows": len(windows),
        "windows_in_text": len(every),
        "start_token": ("every window" if start else "text") if added else "none",
    }
    if against is None:
        result = evaluate.perplexity(subject.network, windows, progress)
        _report(model, result, None, summary, setting, as_json)
        return
    original = load_subject(against, device=device, threads=threads)
    divergence = evaluate.divergence(subject.network, original.network, windows, progress)
    _report(model, divergence.perplexity, divergence, summary, setting, as_json)


def _check_context(context: int, limit: int | None) -> None:
    if context < 2 or (limit is not None and context > limit):
        allowed = f"2 to the model's {limit}" if limit is not None else "2 or more"
        raise click.UsageError(f"--context is {context} tokens, allowed: {allowed}")


def _report(
    file: str,
    result: PerplexityResult,
    divergence: DivergenceResult | None,
    summary: FileSummary | None,
    setting: dict[str, Any],
    as_json: bool,
) -> None:
    if as_json:
        emit_json(_record(file, result, divergence, summary, setting))
        return
    used, every = setting["windows"], setting["windows_in_text"]
    click.echo(
        f"{file}: {result.tokens} tokens scored in {used}{'' if used == every else f' of {every}'} "
        f"windows of {setting['context']}, stride {setting['stride']}, "
        f"{START_TOKENS[setting['start_token']]}"
    )
    if summary is not None:
        click.echo(rates_text(summary))
    rows = [
        ("perplexity", f"{result.perplexity:.4f}", f"{result.standard_error:.4f}"),
        ("negative log likelihood, nats/token", *_row(result.nll)),
    ]
    if divergence is not None:
        original = divergence.original_perplexity
        rows += [
            ("original perplexity", f"{original.perplexity:.4f}", f"{original.standard_error:.4f}"),
            ("KL mean, nats/token", *_row(divergence.kl)),
            ("KL median", f"{divergence.kl_median:.6f}", ""),
            ("KL 90th percentile", f"{divergence.kl_p90:.6f}", ""),
            ("KL 99th percentile", f"{divergence.kl_p99:.6f}", ""),
            ("same likeliest token", *_row(divergence.same_top)),
        ]
    print_table("", ("measure", "value", "±"), rows)


def _row(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.mean:.6f}", f"{estimate.standard_error:.6f}"


def _record(
    file: str,
    result: PerplexityResult,
    divergence: DivergenceResult | None,
    summary: FileSummary | None,
    setting: dict[str, Any],
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "model": file,
        **setting,
        "tokens": result.tokens,
        "nll": asdict(result.nll),
        "perplexity": {"mean": result.perplexity, "standard_error": result.standard_error},
    }
    if summary is not None:
        record |= {
            "file_bytes": summary.file_bytes,
            "rate_bits_per_weight": summary.rate_bits_per_weight,
            "file_bits_per_parameter": summary.file_bits_per_parameter,
        }
    if divergence is not None:
        original = divergence.original_perplexity
        record |= {
            "original_perplexity": {
                "mean": original.perplexity,
                "standard_error": original.standard_error,
            },
            "kl": asdict(divergence.kl),
            "kl_median": divergence.kl_median,
            "kl_p90": divergence.kl_p90,
            "kl_p99": divergence.kl_p99,
            "same_top": asdict(divergence.same_top),
        }
    return record

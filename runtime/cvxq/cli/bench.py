"""`cvxq bench`: loading, prefill, decoding, bandwidth and memory, one JSON line at the end."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cvxq.cli.options import context_option, load_model, model_file, running_options
from cvxq.cli.output import Progress, bytes_text, emit_json

if TYPE_CHECKING:
    from cvxq.model import Model

DEFAULT_PROMPT_TOKENS, DEFAULT_TOKENS = 128, 64


@click.command("bench", short_help="Measure loading, prefill, decoding and memory.")
@click.argument("file")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    help="Tokens to read; default: 128, or half of a shorter context.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    help="Tokens to generate; default: 64, or half of a shorter context.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@context_option
@running_options
def command(
    file: str,
    prompt_tokens: int | None,
    tokens: int | None,
    repeats: int,
    context: int | None,
    weights: str,
    device: str,
    threads: int | None,
) -> None:
    """Measure how fast FILE loads, reads a prompt and generates, and what memory it takes.

    Speeds are means ± standard deviations over the repeats. GB/s are bytes of weights read per
    token times tokens per second, beside the bandwidth of a plain copy measured in this run
    (bytes read plus written). The last line is one JSON object.

    \b
    Example:
      cvxq bench model.cvxq --threads 4
    """
    path = model_file(file)
    size = path.stat().st_size
    import cvxq.loading  # noqa: F401 - importing is not loading

    begin = time.perf_counter()
    with load_model(path, weights, device, threads, context, tokenizer=False) as model:
        load_seconds = time.perf_counter() - begin
        prompt_tokens, tokens = fit(model.context_length, prompt_tokens, tokens)
        record = measure(model, prompt_tokens, tokens, repeats)
    record = {"file_bytes": size, "weights": weights, "load_seconds": load_seconds, **record}
    for line in describe(record):
        click.echo(line)
    emit_json(record, indent=None)


def fit(limit: int | None, prompt_tokens: int | None, tokens: int | None) -> tuple[int, int]:
    """Return both counts, defaults cut to half the context; UsageError if the sum exceeds it."""
    half = max(1, (limit or 2 * DEFAULT_PROMPT_TOKENS) // 2)
    prompt_tokens = prompt_tokens or min(DEFAULT_PROMPT_TOKENS, half)
    tokens = tokens or min(DEFAULT_TOKENS, half)
    if limit is not None and prompt_tokens + tokens > limit:
        raise click.UsageError(
            f"--prompt-tokens {prompt_tokens} and --tokens {tokens} together exceed the model's "
            f"context of {limit}; give fewer"
        )
    return prompt_tokens, tokens


def measure(model: Model, prompt_tokens: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Run everything and return the figures as JSON types."""
    from cvxq import bench

    speed = bench.measure_speed(
        model.session, model.vocabulary, prompt_tokens, tokens, repeats, Progress()
    )
    path = describe_path(model, tokens)
    device, threads = path["device"], path["threads"]
    if device == "cpu":
        peak = bench.peak_memory_bytes()  # before the copy's own buffers
        copied = bench.copy_bandwidth(threads)
    else:
        peak = bench.device_peak_memory_bytes(device)
        copied = bench.device_copy_bandwidth(device)
    per_token = path["weight_bytes_per_token"]
    read = per_token * speed.decode.mean
    return {
        **path,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "repeats": repeats,
        "prefill_tokens_per_second": asdict(speed.prefill),
        "decode_tokens_per_second": asdict(speed.decode),
        "weight_gigabytes_per_second": read / 1e9,
        "copy_gigabytes_per_second": copied / 1e9,
        "share_of_copy_bandwidth": read / copied,
        "peak_memory_bytes": peak,
    }


def describe_path(model: Model, tokens: int) -> dict[str, Any]:
    """Return what runs the model, where, on how many threads, and what a token costs it."""
    from cvxq import bench
    from cvxq.lean.native_decoder import NativeDecoder

    if isinstance(model.decoder, NativeDecoder):
        return {
            "path": "lean",
            "device": model.device,
            "threads": model.decoder.threads,
            "weight_bytes_per_token": model.decoder.bytes_per_token,
            "overhead_seconds_per_layer": bench.overhead_seconds_per_layer(model.decoder, tokens),
        }
    import torch

    if model.decoder is not None:
        read = model.decoder.bytes_per_token
    else:
        from cvxq.network import weight_bytes_per_token

        read = weight_bytes_per_token(model.network)
    return {
        "path": "transformers" if model.decoder is None else "lean",
        "device": model.device,
        "threads": torch.get_num_threads(),
        "weight_bytes_per_token": read,
        "overhead_seconds_per_layer": None,
    }


def describe(record: dict[str, Any]) -> list[str]:
    """Return the figures as lines for a reader."""
    peak, overhead = record["peak_memory_bytes"], record["overhead_seconds_per_layer"]
    outside = [] if overhead is None else [f"layers   {1e6 * overhead:.1f} µs each beside matrices"]
    return [
        f"load     {record['load_seconds']:.3f} s, {bytes_text(record['file_bytes'])} bytes, "
        f"weights {record['weights']}, {record['path']} path on {record['device']}, "
        f"{record['threads']} threads",
        f"prefill  {_spread(record['prefill_tokens_per_second'])} tokens/s "
        f"({record['prompt_tokens']} tokens, {record['repeats']} repeats)",
        f"decode   {_spread(record['decode_tokens_per_second'])} tokens/s "
        f"({record['tokens']} tokens, {record['repeats']} repeats)",
        *outside,
        f"weights  {record['weight_gigabytes_per_second']:.3f} GB/s read "
        f"({bytes_text(record['weight_bytes_per_token'])} bytes per token), "
        f"{record['share_of_copy_bandwidth']:.1%} of the copy bandwidth of "
        f"{record['copy_gigabytes_per_second']:.1f} GB/s",
        f"memory   {bytes_text(peak)} bytes at the peak" if peak else "memory   peak unknown here",
    ]


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['mean']:.1f} ± {spread['deviation']:.1f}"

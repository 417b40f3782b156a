"""What files, and what peers made of the same model, lose on texts: one table, one evaluator.

    python benchmarks/losses.py MODEL --text wiki.test.raw --text code.txt FILE.cvxq PEERS/RESULT

MODEL is the original's folder or hub id.  Files are expanded, and of peers the weights are taken
that benchmarks/quality.py had them make of this model: folders with a matrices.safetensors and a
summary.json (in its --peers folder, under work/peers).  All run through transformers in float32,
and see the same windows, each with the start tokens that the tokenizer puts before a text.  Bits
are those of the quantized matrices with all their side information, of peers as if packed tightly.
D is the increase of the loss per token, ln(perplexity / perplexity of the original).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cvxq import evaluate, load
from cvxq_converter.products import fast_products
from cvxq_converter.source.checkpoint import Source, load_network, load_tokenizer, open_source
from cvxq_format import CompandedTensor, Reader
from cvxq_format.text import start_tokens
from packing import cpu_name
from safetensors.torch import load_file

MATRICES = "matrices.safetensors"


@dataclass(frozen=True)
class Quantized:
    """A network with quantized weights. rate: bits per quantized weight; weights: how many."""

    network: Any
    rate: float
    weights: int


def opened(path: Path, source: Source) -> Quantized:
    """Expand a file, or put a peer's matrices into a copy of the original."""
    if path.is_file():
        network = load(path, weights="dense").network.float()
        with Reader(path) as reader:
            rate = json.loads(reader.file("report.json"))["rate_bits_per_weight"]
            packed = [t for t in map(reader.read, reader.names) if isinstance(t, CompandedTensor)]
            return Quantized(network, rate, sum(t.rows * t.columns * t.experts for t in packed))
    matrices = load_file(path / MATRICES)
    network = load_network(source, torch.float32)
    extra = network.load_state_dict(matrices, strict=False).unexpected_keys
    if extra:
        raise SystemExit(f"losses: {path}: {extra[0]} is no matrix of the original")
    weights = sum(matrix.numel() for matrix in matrices.values())
    bits = sum(json.loads((path / "summary.json").read_text())["bits"].values())
    return Quantized(network, bits / weights, weights)


def cut(tokenizer: Any, text: Path, context: int, count: int) -> list[evaluate.Window]:
    """The first windows of a text."""
    start = start_tokens(tokenizer)
    ids = evaluate.token_ids(tokenizer, text.read_text("utf-8"), not start)
    return evaluate.windows(ids, context, start=start)[:count]


def row(
    name: str, made: Quantized, parameters: int, found: Sequence[evaluate.DivergenceResult]
) -> str:
    """A line of the table."""
    share = f"{made.weights / parameters:.0%}"
    cells = [name, f"{made.rate:.3f}", share]
    for result in found:
        kl, increase = result.kl, result.nll_increase
        cells.append(f"{kl.mean:.4f} ± {kl.standard_error:.4f}")
        cells.append(f"{increase.mean:.3f} ± {increase.standard_error:.3f}")
        cells.append(f"{result.perplexity.perplexity:.2f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure all, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=12, help="of each text, at most so many")
    options = parser.parse_args()
    source = open_source(options.model)
    tokenizer = load_tokenizer(source)
    texts = [cut(tokenizer, text, options.context, options.windows) for text in options.text]
    with torch.no_grad(), fast_products("cpu"):
        original = load_network(source, torch.float32)
        parameters = sum(p.numel() for p in original.parameters())
        print(f"{source.name}, {cpu_name()}, {torch.get_num_threads()} threads\n")
        for text, windows in zip(options.text, texts, strict=True):
            before = evaluate.perplexity(original, windows)
            print(f"- {text.name}: {before.tokens:,} tokens, original {before.perplexity:.2f}")
        columns = [f"KL, {t.stem} | D | perplexity" for t in options.text]
        print(f"\n| | bits per weight | quantized | {' | '.join(columns)} |")
        print(f"|---|---:|---:|{'---:|' * (3 * len(columns))}")
        for path in options.results:
            made = opened(path, source)
            found = [evaluate.divergence(made.network, original, windows) for windows in texts]
            print(row(path.name, made, parameters, found), flush=True)


if __name__ == "__main__":
    main()

"""What writing several texts side by side gains on the CPU.

    python benchmarks/side_by_side.py MODEL.cvxq [--texts 1 2 4 8 16] [--threads 2] [--rounds 5]

Every round gives each number of texts a turn, so that what else the machine does meets all alike:
prompts of ragged lengths are read, then some tokens of each are chosen, a pass for all of them at a
time. Printed are tokens per second of all texts together, the best round and the median, and what
they are of one text's. One text alone is read as `cvxq generate` does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import cvxq
import numpy as np
from cpu_page import head
from cvxq.lean.decoder import BatchingDecoder

PROMPT_TOKENS = range(40, 104, 4)  # of the texts of a batch
TOKENS = 24  # written to each text


def tokens_per_second(decoder: BatchingDecoder, texts: int) -> float:
    """Read prompts, write TOKENS tokens to each, and return tokens over seconds of writing."""
    rng = np.random.default_rng(texts)
    longest = max(PROMPT_TOKENS) + TOKENS
    prompts = [rng.integers(0, decoder.vocabulary, length).tolist() for length in PROMPT_TOKENS]
    if texts == 1:
        decoder.rewind(0)
        logits = np.asarray(decoder.feed(prompts[0]))
        begin = time.perf_counter()
        for _ in range(TOKENS):
            logits = np.asarray(decoder.feed([int(logits.argmax())]))
        return TOKENS / (time.perf_counter() - begin)
    batch = decoder.batch(texts, longest)
    if batch is None or batch.texts < texts:
        raise SystemExit(f"side_by_side: this model or memory allows fewer than {texts} texts")
    found = np.asarray(batch.read(list(enumerate(prompts[:texts]))))
    begin = time.perf_counter()
    for _ in range(TOKENS):
        found = np.asarray(batch.read([(text, [int(t)]) for text, t in enumerate(found.argmax(1))]))
    return texts * TOKENS / (time.perf_counter() - begin)


def table(speeds: Mapping[int, Sequence[float]]) -> list[str]:
    """Rows of a Markdown table."""
    one = {pick: pick(speeds[min(speeds)]) for pick in (max, statistics.median)}
    rows = head(("texts", "tokens/s, best", "median", "of the first's, best", "median"))
    for texts, found in speeds.items():
        values = [pick(found) for pick in one]
        gains = [value / first for value, first in zip(values, one.values(), strict=True)]
        rows.append(
            f"| {texts} | {values[0]:.1f} | {values[1]:.1f} | {gains[0]:.2f} | {gains[1]:.2f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with cvxq.load(options.model, threads=options.threads) as model:
        decoder = model.decoder
        if not isinstance(decoder, BatchingDecoder):
            raise SystemExit("side_by_side: this model has no decoder that reads texts together")
        speeds: dict[int, list[float]] = {}
        for _ in range(options.rounds):
            for texts in options.texts:
                speeds.setdefault(texts, []).append(tokens_per_second(decoder, texts))
    print(f"{options.model.name}, {options.threads} threads, {options.rounds} rounds")
    print(*table(speeds), sep="\n")


if __name__ == "__main__":
    main()

"""What a very long text takes in memory: python benchmarks/long_text.py [FILE] [--tokens 100000]

Draws one text, token by token, in a context of 131,072, and says after every tenth how much memory
is in use (anonymous, so without mapped files), and what of that are keys and values. Without FILE
the model has two layers of random weights: one sees a window of 8 tokens, the other everything. The
exit code is 1 if anything but keys and values grew by more than 1 % after the first tenth.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import cvxq
from cvxq.sample import SamplingSettings

CONTEXT = 131_072
MOST_GROWTH = 0.01


def in_use() -> int:
    """Bytes of this process that are in memory, mapped files left out."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def make_model(folder: Path) -> Path:
    """Convert a tiny Gemma 3 of random weights; return its file."""
    import torch
    from cvxq_converter.job import convert
    from cvxq_converter.options import ConversionOptions
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder / "model")
    target = folder / "model.cvxq"
    options = ConversionOptions.of(bits=4.0, calibration="none", group_size=16)
    convert(str(folder / "model"), target, options)
    return target


def main() -> int:
    """Draw and watch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or make_model(Path(folder))
        with cvxq.load(file, threads=1, context=CONTEXT) as model:
            decoder: Any = model.decoder
            tokens = model.session().draw([1], SamplingSettings(temperature=1.0, seed=1))
            began, beside = time.monotonic(), []
            print(f"{'tokens':>8} {'in use MB':>12} {'keys and values MB':>19} {'the rest MB':>12}")
            for _tenth in range(10):
                for _ in islice(tokens, options.tokens // 10):
                    pass
                now, kept = in_use(), decoder.native.nbytes
                beside.append(now - kept)
                figures = [f"{value / 1e6:.1f}" for value in (now, kept, now - kept)]
                row = (decoder.length, *figures)
                print("{:8} {:>12} {:>19} {:>12}".format(*row), flush=True)
            seconds = time.monotonic() - began
    growth = max(beside) / beside[0] - 1
    rate = options.tokens / seconds
    print(f"{rate:.0f} tokens/s; the rest grew by {growth:.2%}, allowed {MOST_GROWTH:.0%}")
    return int(growth > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())

"""Blocks against the whole for architectures of all kinds: a sample of docs/architectures.md."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures  # noqa: E402

PAGE = (ROOT / "docs" / "architectures.md").read_text("utf-8")
STATED = dict(re.findall(r"^\| `(\S+)` \| ([\w ]+) \|", PAGE, re.M))
# Parallel blocks, positions from a table, local attention, latent attention with shared experts,
# experts with sinks, blocks that share keys, no list of blocks, weights of no known kind.
SAMPLE = ("gptj", "opt", "gpt_neo", "deepseek_v3", "gpt_oss", "gemma3n_text", "ctrl", "mamba")


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_is_converted_as_the_page_says(name: str) -> None:
    if name not in architectures.names():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what transformers thinks of such sizes
        found = architectures.judge(name)
    assert found.word != "WRONG", found.detail
    if f"transformers {transformers.__version__}:" in PAGE:
        assert found.word == STATED[name]


def test_the_page_counts_what_it_lists() -> None:
    words = list(STATED.values())
    for count, word in re.findall(r"(\d+) (by blocks|in one piece|refused|not tried)", PAGE):
        assert words.count(word) == int(count)
    assert "WRONG" not in PAGE

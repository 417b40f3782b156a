"""A long text: nothing grows but the keys and values of its tokens."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import cvxq
import pytest
from cvxq.sample import SamplingSettings
from cvxq.summary import summarize
from cvxq_kernels import cpu

CONTEXT = 131_072
TOKENS = 12_000
SETTLED = 5_000  # tokens after which everything has been used once
ROOM = 2 << 20  # bytes: of the list of tokens, which is the text itself, and of the allocator

BEHIND = 4096 + 64  # bytes behind each block of 64 tokens, which prefetches reach


def in_use() -> int:
    """Bytes of this process that are in memory, mapped files left out."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())
def test_a_long_text_takes_its_keys_and_values_and_no_more(
    make_file: Callable[..., Any],
) -> None:
    path = make_file("gemma3", config={"max_position_embeddings": CONTEXT}).path
    size = summarize(path).cache
    assert size is not None
    settings = SamplingSettings(temperature=1.0, seed=1)
    with cvxq.load(path, threads=1) as model:
        decoder: Any = model.decoder
        assert decoder.capacity == CONTEXT
        native = decoder.native
        tokens = model.session().draw([1], settings)
        assert len(list(islice(tokens, SETTLED))) == SETTLED
        held, beside = native.nbytes, in_use() - native.nbytes
        assert len(list(islice(tokens, TOKENS - SETTLED))) == TOKENS - SETTLED
        more = TOKENS - SETTLED
        grown = native.nbytes - held - more // 64 * BEHIND
        assert grown == pytest.approx(more * size.bytes_per_token, rel=0.01)
        assert in_use() - native.nbytes < beside + ROOM

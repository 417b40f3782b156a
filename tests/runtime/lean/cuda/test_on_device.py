"""The lean decoder on a CUDA device: the same values, captured or not, in bounded memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cvxq.lean import record_of
from cvxq.lean.cuda.decoder import TorchDecoder
from cvxq.lean.cuda.opening import WORKING_BYTES, open_torch_decoder
from cvxq.sample import SamplingSettings
from cvxq_format import Reader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

MakeFile = Callable[..., Any]
IDS = [(7 * index + 3) % 96 for index in range(40)]


def decoder_of(made: Any) -> TorchDecoder:
    with Reader(made.path) as reader:
        return open_torch_decoder(record_of(reader), reader, "cuda", {})


def drawn(decoder: TorchDecoder, count: int = 20, **settings: Any) -> list[int]:
    decoder.rewind(0)
    decoder.feed(IDS[:10])
    tokens = decoder.draw(SamplingSettings(**settings), IDS[:10])
    return [next(tokens) for _ in range(count)]


def test_logits_equal_transformers(lean_kind: str, make_file: MakeFile) -> None:
    """Within float16 (or int8 activations') error of float32 logits of size 1 to 10."""
    made = make_file(lean_kind)

    def expected(end: int) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = made.network(input_ids=torch.tensor([IDS[:end]])).logits[0]
        return logits.float()

    decoder, whole = decoder_of(made), expected(40)
    bound = 0.05 * float(whole.abs().max())
    assert float((decoder.logits(IDS) - whole).abs().max()) < bound
    for end in (20, *range(30, 41)):
        logits = decoder.feed(IDS[decoder.length : end])
        assert float((logits.cpu() - expected(end)[-1]).abs().max()) < bound


@pytest.mark.parametrize("kind", ["llama", "qwen2-window", "gemma2", "opt"])
def test_a_captured_step_equals_launching_it(kind: str, make_file: MakeFile) -> None:
    made = make_file(kind)
    said: list[str] = []
    captured, launched = decoder_of(made), decoder_of(made)
    captured._notify = said.append
    launched._uses_graphs = False
    for decoder in (captured, launched):
        decoder.feed(IDS[:10])
    for token in IDS[10:]:
        assert torch.equal(captured.feed([token]), launched.feed([token]))
    assert not said
    assert drawn(captured, temperature=0) == drawn(launched, temperature=0)
    assert not said


def test_the_seed_decides(make_file: MakeFile) -> None:
    decoder = decoder_of(make_file("llama"))
    rules = {"temperature": 2.0, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
    first = drawn(decoder, seed=1, **rules)
    assert drawn(decoder, seed=1, **rules) == first != drawn(decoder, seed=2, **rules)


def test_memory(make_file: MakeFile) -> None:
    """Weights, keys and values and a tenth of both, plus the stated constant; no growth after."""
    made = make_file("llama")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoder = decoder_of(made)
    drawn(decoder)
    held = decoder.network.weights.matrix_bytes() + decoder.cache.nbytes
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * held + WORKING_BYTES
    settled = torch.cuda.memory_allocated()
    drawn(decoder)
    assert torch.cuda.memory_allocated() <= settled

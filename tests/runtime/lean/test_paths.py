"""Which models run lean, that both paths agree, and that the lean one imports little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxq
import numpy as np
import pytest
import torch
from cvxq import evaluate
from cvxq.cache import NetworkSession
from cvxq.generate import generate_tokens
from cvxq.lean import open_native, record_of
from cvxq.lean.native_decoder import NativeDecoder
from cvxq.lean.session import LeanSession
from cvxq.sample import SamplingSettings
from cvxq_format import Reader
from cvxq_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())

MakeFile = Callable[..., Any]
PRODUCT_ERROR = 0.03  # of packed weights, which round their inputs to 8 bits; share of the norm
PROMPT = [5, 17, 80, 33, 2, 41]


def exact_decoder(path: Path) -> NativeDecoder:
    with Reader(path) as reader:
        return open_native(record_of(reader), reader, 2, exact=True)


def test_both_paths_generate_the_same(lean_kind: str, make_file: MakeFile) -> None:
    made = make_file(lean_kind)
    # Not beyond 32 tokens, where a network keeps keys that longrope would turn in another way.
    greedy = SamplingSettings(temperature=0, max_tokens=26)
    expected = list(generate_tokens(NetworkSession(made.network, 64), PROMPT, greedy))
    session = LeanSession(exact_decoder(made.path))
    assert list(generate_tokens(session, PROMPT, greedy)) == expected


def test_both_paths_measure_the_same_perplexity(make_file: MakeFile) -> None:
    made = make_file("llama")
    windows = evaluate.windows([token * token % 96 for token in range(90)], 40, 25)
    expected = evaluate.perplexity(made.network, windows)
    decoder = exact_decoder(made.path)
    found = evaluate.perplexity(decoder, windows)
    assert found.tokens == expected.tokens
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    divergence = evaluate.divergence(decoder, made.network, windows)
    assert divergence.kl.mean < 1e-8
    assert divergence.same_top.mean == 1


def test_sessions_take_turns_on_one_decoder(make_file: MakeFile) -> None:
    decoder = exact_decoder(make_file("llama").path)
    one, other = LeanSession(decoder), LeanSession(decoder)
    expected = LeanSession(decoder).resume([*PROMPT, 9, 10])
    one.resume(PROMPT)
    other.resume([1, 2, 3])
    one.feed([9])
    other.feed([4])
    np.testing.assert_allclose(one.feed([10]), expected, atol=1e-5, rtol=0)
    assert (one.ids, other.ids) == ([*PROMPT, 9, 10], [1, 2, 3, 4])
    fed = decoder.length
    one.rewind(6)
    one.feed([9, 10])
    assert decoder.length == fed


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "it has no decoder.json"),
        ({"report.json": b'{"decoder": {"reason": "it is odd"}}'}, "it is odd"),
        ({"report.json": b"{"}, "it has no decoder.json"),
        (
            {"decoder.json": b'{"version": 99}'},
            "decoder.json has version 99, this reader knows 1 to 2; update cvxq",
        ),
    ],
)
def test_without_a_record_that_is_understood_transformers_runs(
    files: dict[str, bytes], reason: str, make_file: MakeFile
) -> None:
    made = make_file("llama", with_record=False, files=files)
    with cvxq.load(made.path) as model:
        assert model.decoder is None
        assert model.transformers_reason == reason
        tokens = torch.tensor([PROMPT])
        with torch.inference_mode():
            expected = made.network(input_ids=tokens).logits[0, -1].numpy()
        found = np.asarray(model.session().resume(PROMPT))
        assert np.linalg.norm(found - expected) <= PRODUCT_ERROR * np.linalg.norm(expected)


def test_without_the_library_transformers_runs(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda: "no compiler was found")
    with cvxq.load(make_file("llama").path) as model:
        assert model.decoder is None
        assert model.transformers_reason == "the native library is missing: no compiler was found"
        assert model.session().resume(PROMPT).shape == (96,)


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_the_network_is_there_for_who_asks(weights: Any, make_file: MakeFile) -> None:
    made = make_file("llama")
    with cvxq.load(made.path, weights=weights) as model:
        assert (model.decoder is None) == (weights == "dense")
        assert model.transformers_reason is None
        tokens = torch.tensor([PROMPT])
        with torch.inference_mode():
            found = model.network(input_ids=tokens).logits
            expected = made.network(input_ids=tokens).logits
        assert (found - expected).norm() <= PRODUCT_ERROR * expected.norm()

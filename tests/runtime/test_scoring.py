"""Endings that are scored side by side get what they get one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cvxq import scoring
from cvxq.errors import ArgumentError, ContextError
from cvxq.lean import record_of
from cvxq.lean.cuda.decoder import TorchDecoder
from cvxq.lean.cuda.network import TorchNetwork
from cvxq.lean.cuda.weights import load_weights
from cvxq.lean.native_decoder import NativeDecoder
from cvxq.scoring import Ending, Score, score, score_together
from cvxq_format import Reader
from cvxq_kernels import cpu

MakeFile = Callable[..., Any]
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # nats

needs_native = pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())


def native(path: Any) -> NativeDecoder:
    with Reader(path) as reader:
        return NativeDecoder(record_of(reader), reader, 1, exact=True)


def in_torch(path: Any) -> TorchDecoder:
    with Reader(path) as reader:
        record = record_of(reader)
        weights = load_weights(record, reader, CPU, torch.float32)
    return TorchDecoder(TorchNetwork(record, weights, CPU, torch.float32), prefill_tokens=16)


def questions() -> list[Ending]:
    """Choices of one to six tokens after questions that begin alike, not in their order."""
    begin = tuple((5 * index) % 96 for index in range(30))
    made = [
        Ending((*begin[: 30 - 3 * q], q, q + 1), tuple((7 * c + k) % 96 for k in range(1 + c + q)))
        for q in range(3)
        for c in range(4)
    ]
    return [*made[::2], Ending((9,), (3, 4)), Ending((9,), (3,)), *made[1::2], made[0]]


def check(decoder: Any, texts: int) -> None:
    endings = questions()
    found = dict(score_together(decoder.batch(texts, 64), endings))
    assert sorted(found) == list(range(len(endings)))
    for index, ending in enumerate(endings):
        first = np.asarray(decoder.logits(ending.given))[-1:]
        rows = np.asarray(decoder.logits([*ending.given, *ending.scored[:-1]]))
        rows = np.concatenate([first, rows[len(ending.given) :]])  # longrope: short, then long
        expected = score(rows, ending.scored)
        assert found[index].value == pytest.approx(expected.value, abs=TOLERANCE)
        assert found[index].is_likeliest == expected.is_likeliest


@needs_native
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral", "phi3-longrope"])
@pytest.mark.parametrize("texts", [1, 3, 16])
def test_native_texts(texts: int, kind: str, make_file: MakeFile) -> None:
    check(native(make_file(kind).path), texts)


@pytest.mark.parametrize("texts", [1, 3, 16])
def test_texts_in_torch(texts: int, make_file: MakeFile) -> None:
    check(in_torch(make_file("llama").path), texts)


@needs_native
def test_few_logits_are_held_at_once(make_file: MakeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_LOGITS", 2 * 96)
    check(native(make_file("llama").path), 3)


class Counting:
    """A batch whose logits tell what was read, and which counts."""

    vocabulary, capacity = 96, 64

    def __init__(self, texts: int) -> None:
        self.texts = texts
        self.has: list[list[int]] = [[] for _ in range(texts)]
        self.tokens = self.passes = 0

    def read_each(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> list[Any]:
        self.passes += 1
        self.tokens += sum(len(ids) for _, ids in pieces)
        found = []
        for text, ids in pieces:
            rows = np.zeros((len(ids), 96), np.float32)
            for row, token in zip(rows, ids, strict=True):
                self.has[text].append(token)
                row[sum(self.has[text]) % 96] = 9  # which every token of the text decides
            found.append(rows)
        return found

    def read(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> Any:
        return np.stack([rows[-1] for rows in self.read_each(pieces)])

    def rewind(self, text: int, length: int) -> None:
        self.has[text] = self.has[text][:length]

    def copy(self, source: int, target: int, length: int) -> None:
        self.has[target] = self.has[source][:length]


def scored_alone(ending: Ending) -> Score:
    (rows,) = Counting(1).read_each([(0, [*ending.given, *ending.scored[:-1]])])
    return score(rows[-len(ending.scored) :], ending.scored)


@pytest.mark.parametrize("texts", [1, 2, 5, 16])
def test_every_text_is_what_it_should_be(texts: int) -> None:
    endings = questions()
    for index, found in score_together(Counting(texts), endings):
        assert found == scored_alone(endings[index])


def test_what_texts_have_in_common_is_read_once() -> None:
    """Forty tokens of solved examples, five questions of two, four choices of three."""
    examples = tuple(range(40))
    endings = [Ending((*examples, q, 7), (c, 1, 2)) for q in range(5) for c in range(4)]
    batch = Counting(8)
    assert len(list(score_together(batch, endings))) == 20
    assert batch.tokens == 40 + 5 * 2 + 20 * 2
    assert batch.passes == 1 + 3 * 2


def test_what_does_not_fit_or_is_not_there() -> None:
    with pytest.raises(ContextError, match=r"65 tokens are to be read, .* holds 64; shorten"):
        list(score_together(Counting(2), [Ending((1,) * 60, (2,) * 6)]))
    assert list(score_together(Counting(2), [])) == []
    for given, scored in (((), (1,)), ((1,), ())):
        with pytest.raises(ArgumentError, match="give at least one token"):
            Ending(given, scored)


def test_scores_are_log_likelihoods() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 9 + 70
    best = logits.argmax(-1)
    tokens = torch.tensor([3, 1, 4, 1, 5])
    exact = torch.log_softmax(logits.double(), -1)
    for chosen in (best, tokens):
        found = score(logits.numpy(), chosen.tolist())
        expected = float(exact[range(5), chosen].sum())
        assert found.value == pytest.approx(expected, abs=1e-5)
        assert found.is_likeliest == bool((chosen == best).all())

"""Answers that are written side by side are those that are written one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from cvxq.errors import ArgumentError, ContextError
from cvxq.generate import generate_text
from cvxq.lean import record_of
from cvxq.lean.native_decoder import NativeDecoder
from cvxq.lean.session import LeanSession
from cvxq.sample import SamplingSettings
from cvxq.together import Order, generate_together
from cvxq_format import Reader
from cvxq_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())


class Letters:
    """A tokenizer of 96 characters."""

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(33 + token) for token in token_ids)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 33 for letter in text]}


@pytest.fixture
def decoder(make_file: Callable[..., Any]) -> NativeDecoder:
    with Reader(make_file("llama").path) as reader:
        return NativeDecoder(record_of(reader), reader, 1, exact=True)


def orders(settings: SamplingSettings, count: int = 7) -> list[Order]:
    """Prompts with a beginning in common, of several lengths, the last one as long as may be."""
    begin = [(5 * index) % 96 for index in range(30)]
    prompts = [[*begin[: 30 - index], index, 3 * index + 1] for index in range(count - 1)]
    return [Order(ids, settings, {2}) for ids in [*prompts, [7] * 64]]


@pytest.mark.parametrize("texts", [1, 3, 16])
def test_answers_equal_those_written_alone(texts: int, decoder: NativeDecoder) -> None:
    for settings in (
        SamplingSettings(temperature=0, max_tokens=12),
        SamplingSettings(seed=4, stop=("a", "Q"), repetition_penalty=1.2),
    ):
        wanted = orders(settings)
        found = dict(generate_together(decoder.batch(texts, 64), Letters(), wanted))
        assert sorted(found) == list(range(len(wanted)))
        for index, order in enumerate(wanted):
            session = LeanSession(decoder)
            alone = generate_text(session, Letters(), order.prompt_ids, settings, order.end_ids)
            assert found[index] == alone


class Counting:
    """A batch that counts what is read."""

    def __init__(self, texts: int) -> None:
        self.texts, self.capacity, self.tokens, self.copied = texts, 64, 0, 0

    def read(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> Any:
        self.tokens += sum(len(ids) for _, ids in pieces)
        return np.zeros((len(pieces), 96), np.float32)

    def rewind(self, text: int, length: int) -> None: ...

    def copy(self, source: int, target: int, length: int) -> None:
        self.copied += length


def test_what_prompts_have_in_common_is_read_once() -> None:
    batch, settings = Counting(4), SamplingSettings(temperature=0, max_tokens=1)
    same = [Order([*range(40), index], settings, ()) for index in range(9)]
    assert len(list(generate_together(batch, Letters(), same))) == 9
    assert batch.tokens == 40 + 9
    assert batch.copied == 3 * 40  # later ones find it where they are


@pytest.mark.parametrize(("ids", "error"), [([], ArgumentError), ([1] * 65, ContextError)])
def test_a_prompt_that_cannot_be_read_is_refused(ids: list[int], error: type[Exception]) -> None:
    with pytest.raises(error, match="the prompt has"):
        list(generate_together(Counting(2), Letters(), [Order(ids, SamplingSettings(), ())]))

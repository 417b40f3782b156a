"""Texts that go on when the context is full, on every path that runs a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import cvxq
import pytest
from cvxq.chat import Conversation
from cvxq.lean import record_of
from cvxq.lean.cuda.opening import open_torch_decoder
from cvxq.model import Model, NetworkOptions
from cvxq.sample import SamplingSettings
from cvxq.session import without_oldest_half
from cvxq_format import Reader

MakeFile = Callable[..., Any]
PROMPT = [1, 17, 80, 33, 2, 41]


@pytest.mark.parametrize(
    ("length", "keep", "kept"),
    [
        (9, 0, [4, 5, 6, 7, 8]),
        (9, 1, [0, 5, 6, 7, 8]),
        (9, 3, [0, 1, 2, 6, 7, 8]),
        (9, 99, [0, 1, 2, 3, 6, 7, 8]),
        (3, 1, [0, 2]),
        (2, 1, [0]),
        (2, 0, [1]),
    ],
)
def test_the_oldest_half_goes_and_the_beginning_stays(
    length: int, keep: int, kept: list[int]
) -> None:
    assert without_oldest_half(range(length), keep) == kept


def open_torch(path: Any) -> Model:
    reader = Reader(path)
    decoder = open_torch_decoder(record_of(reader), reader, "cpu", {})
    decoder.capacity = 40
    return Model(reader, decoder, None, NetworkOptions())


OPEN: dict[str, Callable[[Any], Model]] = {
    "default": lambda path: cvxq.load(path, context=40),
    "transformers": lambda path: cvxq.load(path, weights="dense", context=40),
    "torch": open_torch,
}


@pytest.fixture(params=OPEN)
def open_model(request: pytest.FixtureRequest) -> Callable[[Any], Model]:
    return OPEN[request.param]


@pytest.mark.parametrize("kind", ["llama", "phi3-longrope"])
def test_a_text_goes_on_as_a_fresh_reading_of_what_is_left(
    kind: str, open_model: Callable[[Any], Model], make_file: MakeFile
) -> None:
    """Longrope changes its angles at 32 tokens, there and back at every shift."""
    with open_model(make_file(kind).path) as model:
        session = model.session()
        session.keep = 2
        settings = SamplingSettings(temperature=2, top_k=5, seed=3)
        found: list[int] = []
        for token in session.draw(PROMPT, settings):
            found.append(token)
            assert len(session.ids) <= 40
            if len(found) == 110:
                break
        expected: list[int] = []
        text, seed = PROMPT, 3
        while len(expected) < 110:
            settings = SamplingSettings(temperature=2, top_k=5, seed=seed)
            drawn = list(model.session().draw(text, settings))
            assert len(text) + len(drawn) == 41
            expected += drawn
            text = without_oldest_half([*text, *drawn], 2)
            assert text[:2] == PROMPT[:2]
            seed += len(text)
        assert found == expected[:110]


def test_without_keep_the_text_ends(make_file: MakeFile) -> None:
    with cvxq.load(make_file("llama").path) as model:
        settings = SamplingSettings(temperature=0)
        assert len(list(model.session().draw(PROMPT, settings))) == 64 - len(PROMPT) + 1


def test_the_smallest_context_goes_on(make_file: MakeFile) -> None:
    with cvxq.load(make_file("llama").path, context=2) as model:
        session = model.session()
        session.keep = 1
        settings = SamplingSettings(temperature=0)
        drawn: Iterator[int] = session.draw([7], settings)
        assert len(list(itertools.islice(drawn, 9))) == 9
        assert session.ids[0] == 7


def test_the_opening_of_a_conversation_stays() -> None:
    def encode(messages: list[dict[str, str]]) -> list[int]:
        return [ord(c) for m in messages for c in f"<{m['role'][0]}>{m['content']}\n"] + [60]

    talk = Conversation(encode, 400, 300, system="Be brief.", shifts=True)
    prompt = talk.ask("Hello")
    assert prompt.room == 300
    assert prompt.keep == len("<s>Be brief.\n<u>")
    talk.answered("Hi")
    assert talk.ask("And?").keep == prompt.keep
    ends = Conversation(encode, 40, 300, system="Be brief.")
    assert ends.ask("Hello").keep is None

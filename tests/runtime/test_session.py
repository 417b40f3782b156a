"""Sessions that read in pieces, that can be stopped, and that stand beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cvxq
import numpy as np
import pytest
from cvxq.cache import NetworkSession
from cvxq.generate import generate_tokens
from cvxq.sample import Sampler, SamplingSettings
from cvxq.session import Logits, Session

TEXT = [5, 17, 80, 33, 2, 41, 9, 60, 12, 71]
GREEDY = SamplingSettings(temperature=0, max_tokens=6)


class Notebook(Session):
    """Notes in which pieces a text is read; its logits tell the piece that each token came in."""

    def __init__(self) -> None:
        super().__init__(64)
        self.pieces: list[int] = []

    def rewind(self, length: int) -> None:
        del self.ids[length:]

    def _read(self, ids: Sequence[int]) -> Logits:
        self.ids.extend(ids)
        self.pieces.append(len(ids))
        return np.zeros(3, np.float32)


@pytest.fixture
def model(make_file: Callable[..., Any]) -> Iterator[cvxq.Model]:
    with cvxq.load(make_file("llama").path) as loaded:
        yield loaded


def test_only_whole_pieces_of_prompts_are_reused() -> None:
    session = Notebook()
    session.piece = 4
    session.resume(TEXT)
    assert session.pieces == [4, 4, 2]
    for token in (1, 2, 3):
        session.feed([token])
    session.pieces.clear()
    # Eight tokens stand in whole pieces; what came after was read otherwise than it is now.
    text = [*TEXT, 1, 2, 3, 50]
    assert session.reusable(text) == 8
    session.resume(text)
    assert session.pieces == [4, 2]
    session.pieces.clear()
    session.resume(TEXT[:8])  # the last piece is read again for its logits
    assert session.pieces == [4]
    session.pieces.clear()
    session.resume([*TEXT[:5], 7, 7, 7, 7])
    assert session.pieces == [4, 1]


def test_without_pieces_everything_shared_is_reused() -> None:
    session = Notebook()
    session.resume(TEXT)
    session.feed([1])
    session.pieces.clear()
    assert session.reusable([*TEXT, 1, 2]) == 11
    session.resume([*TEXT, 1, 2])
    assert session.pieces == [1]


def test_a_text_read_in_pieces_gives_the_same_logits_whatever_was_read_before(
    model: cvxq.Model,
) -> None:
    fresh, used = model.session(apart=True), model.session(apart=True)
    fresh.piece = used.piece = 4
    list(generate_tokens(used, TEXT, GREEDY))
    list(generate_tokens(used, [*TEXT[:6], 3], GREEDY))
    np.testing.assert_array_equal(used.resume([*TEXT, 4]), fresh.resume([*TEXT, 4]))


def test_a_network_that_cannot_go_back_reads_prompts_at_once(
    model: cvxq.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.network), "_is_stateful", True)
    session = NetworkSession(model.network)
    session.piece = 4
    reads: list[int] = []
    monkeypatch.setattr(
        session, "_forward", lambda ids: reads.append(len(ids)) or np.zeros(96, np.float32)
    )
    session.resume(TEXT)
    assert reads == [len(TEXT)]


def test_a_check_stops_between_two_tokens_and_leaves_a_usable_session(model: cvxq.Model) -> None:
    session = model.session()
    session.piece = 4
    expected = list(generate_tokens(session, TEXT, GREEDY))
    calls = 0

    def stop_at_the_fifth() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise InterruptedError

    session.check = stop_at_the_fifth
    with pytest.raises(InterruptedError):
        list(generate_tokens(session, [1, *TEXT], GREEDY))
    assert len(session.ids) == len(TEXT) + 2  # three pieces and one token
    session.check = lambda: None
    assert list(generate_tokens(session, TEXT, GREEDY)) == expected


def test_sessions_apart_keep_their_texts(model: cvxq.Model) -> None:
    texts = TEXT, TEXT[::-1]
    alone = [list(generate_tokens(model.session(), text, GREEDY)) for text in texts]
    sessions = [model.session(apart=True) for _ in texts]
    drawn = [session.draw(text, GREEDY) for session, text in zip(sessions, texts, strict=True)]
    mixed = [[next(tokens) for tokens in drawn] for _ in range(6)]
    assert [list(tokens) for tokens in zip(*mixed, strict=True)] == alone
    assert [session.ids[:10] for session in sessions] == list(map(list, texts))
    held = sessions[0].decoder  # type: ignore[attr-defined]
    assert held.length == len(sessions[0].ids)  # not read anew: the text is still there


def test_a_sampler_of_the_caller_chooses(model: cvxq.Model) -> None:
    class Last(Sampler):
        def choose(self, logits: Logits, ids: Sequence[int]) -> int:
            return 7

    drawn = generate_tokens(model.session(), TEXT, GREEDY, sampler=Last(GREEDY))
    assert list(drawn) == [7] * 6


@pytest.mark.parametrize("kind", ["lean", "transformers"])
def test_scores_are_the_logits_after_each_token(model: cvxq.Model, kind: str) -> None:
    session = model.session() if kind == "lean" else NetworkSession(model.network)
    session.piece = 4
    rows = np.concatenate(list(session.score(TEXT)))
    assert session.ids == TEXT
    assert session.settled == 8
    fresh = model.session() if kind == "lean" else NetworkSession(model.network)
    expected = [fresh.feed([token]) for token in TEXT]
    np.testing.assert_allclose(rows, expected, atol=1e-4, rtol=0)


def test_scores_of_a_text_whose_angles_change_are_those_of_the_long_text(
    make_file: Callable[..., Any],
) -> None:
    with cvxq.load(make_file("phi3-longrope").path) as model:
        decoder = model.decoder
        assert decoder is not None
        switch = next(rope.switch for rope in decoder._ropes if rope.switch)  # type: ignore[attr-defined]
        text = [(7 * n) % 90 for n in range(switch + 6)]
        whole = np.asarray(decoder.logits(text))
        decoder.rewind(0)
        decoder.feed(text[:switch])
        np.testing.assert_allclose(
            np.asarray(decoder.rows(text[switch:])), whole[switch:], atol=1e-4
        )

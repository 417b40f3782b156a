"""Making something in a thread of its own."""

from __future__ import annotations

from threading import Event, current_thread

import pytest
from cvxq.beside import Beside


def test_it_is_made_once_in_a_thread_of_its_own() -> None:
    may_end, threads = Event(), []

    def make() -> str:
        threads.append(current_thread())
        assert may_end.wait(30)
        return "made"

    found = Beside(make)
    found.begin()
    found.begin()
    may_end.set()
    assert found.result() == found.result() == "made"
    found.finish()
    assert len(threads) == 1
    assert threads[0] is not current_thread()


def test_it_is_made_here_if_it_was_not_begun() -> None:
    threads = []
    found = Beside(lambda: threads.append(current_thread()))
    found.finish()
    assert not threads
    found.result()
    assert threads == [current_thread()]


def test_what_goes_wrong_is_for_whoever_asks() -> None:
    def make() -> None:
        raise KeyError("a token")

    found = Beside(make)
    found.begin()
    found.finish()
    with pytest.raises(KeyError, match="a token"):
        found.result()

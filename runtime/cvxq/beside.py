"""Something that is made in a thread of its own while others wait for nothing of Python."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Beside(Generic[Made]):
    """What `make` returns; made when asked for, unless it was begun before."""

    def __init__(self, make: Callable[[], Made]) -> None:
        """Make nothing yet."""
        self._make = make
        self._future: Future[Made] | None = None

    def begin(self) -> None:
        """Make it in a thread, if that has not begun."""
        if self._future is None:
            self._future = Future()
            Thread(target=self._fulfil, args=(self._future,), daemon=True).start()

    def result(self) -> Made:
        """Return it, or raise what making it raised."""
        return self._make() if self._future is None else self._future.result()

    def finish(self) -> None:
        """Wait until nothing is in the making."""
        if self._future is not None:
            self._future.exception()

    def _fulfil(self, future: Future[Made]) -> None:
        try:
            future.set_result(self._make())
        except BaseException as error:  # whoever asks for the result is to have it
            future.set_exception(error)

"""Progress and wall-clock time of the stages of a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]  # stage, done, total
Done = Callable[[int, int], None]  # of one stage: done, total


class Stages:
    """Passes progress on to the caller and adds up the time of each stage."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell the caller how far a stage has come."""
        if self._progress:
            self._progress(stage, done, total)

    @contextmanager
    def stage(self, name: str) -> Iterator[Done]:
        """Time a stage; yields its own progress function (done, total)."""
        started = time.perf_counter()
        self.report(name, 0, 1)
        yield lambda done, total: self.report(name, done, total)
        self.report(name, 1, 1)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

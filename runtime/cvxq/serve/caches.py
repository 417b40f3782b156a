"""Sessions, found again by the beginning of their text.

A chat's next turn begins with all of it so far, and finds its session; requests between its turns
that begin otherwise, for a title say, use another one.  Which text is given up for a new one is
decided as GreedyDual does: by what reading it again would cost, and by how long nobody asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cvxq.model import Model
from cvxq.session import Session

PIECE = 64  # tokens of a prompt that are read, and reused, together


@dataclass
class _Entry:
    session: Session
    worth: float = 0.0


class Caches:
    """At most `most` texts of one model; used by one thread at a time."""

    def __init__(self, model: Model, most: int) -> None:
        """Start with none."""
        self._model = model
        self._most = most
        self._entries: list[_Entry] = []
        self._age = 0.0

    def take(self, ids: Sequence[int]) -> Session:
        """Return the session to read the text `ids` with."""
        entry = self._best(ids) or self._new() or self._cheapest()
        entry.worth = self._age + len(ids)
        return entry.session

    def _best(self, ids: Sequence[int]) -> _Entry | None:
        """Return the entry with the longest beginning of `ids`, unless it holds much else."""
        if not self._entries:
            return None
        best = max(self._entries, key=lambda entry: entry.session.reusable(ids))
        reused = best.session.reusable(ids)
        return best if reused and 2 * reused >= best.session.settled else None

    def _new(self) -> _Entry | None:
        if len(self._entries) == self._most:
            return None
        session = self._model.session(apart=True)
        session.piece = PIECE
        self._entries.append(_Entry(session))
        return self._entries[-1]

    def _cheapest(self) -> _Entry:
        cheapest = min(self._entries, key=lambda entry: entry.worth)
        self._age = cheapest.worth
        return cheapest

"""Rotary positions of texts that are turned in another way once they are long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cvxq_format.decoder_record import Rope


class Turning:
    """Which of the ropes' tables the text that a decoder holds is turned by.

    A text longer than the switch is turned by the long tables throughout, so its tokens are
    remembered, to be read anew when it crosses.
    """

    def __init__(self, ropes: Iterable[Rope]) -> None:
        """Start with an empty text; all ropes that switch do so at one length."""
        self._switch = next((rope.switch for rope in ropes if rope.switch is not None), None)
        self._text: list[int] = []
        self.is_long = False

    @property
    def switches(self) -> bool:
        """Whether there is a length from which on texts are turned in another way."""
        return self._switch is not None

    def crosses(self, length: int) -> bool:
        """Whether a text of so many tokens is turned in another way than the present one."""
        return self._switch is not None and (length > self._switch) != self.is_long

    def extend(self, length: int, ids: Sequence[int]) -> None:
        """Remember that `ids` follow the first `length` tokens."""
        if self._switch is not None:
            del self._text[length:]
            self._text += ids

    def cross(self, length: int, ids: Sequence[int]) -> list[int]:
        """Change the tables for the text of `length` tokens and `ids`; return all of it."""
        self.is_long = not self.is_long
        return [*self._text[:length], *ids]

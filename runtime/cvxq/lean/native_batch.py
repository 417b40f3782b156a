"""Several texts on the CPU, read together: one pass of the network over a row of each.

Every text has keys and values of its own, in a decoder that shares the matrices.  What costs is to
go through these, and a pass does it once for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cvxq_kernels.cpu.decoder import TEXTS, Decoder, Piece

Floats = npt.NDArray[np.float32]


class Reader(Protocol):
    """What is asked of a native decoder here; its own file imports this one."""

    native: Decoder
    vocabulary: int
    chunk: int
    exact: bool
    length: int
    capacity: int

    def sibling(self) -> Any:
        """Return an empty one of the same matrices."""

    def begin(self, ids: Sequence[int], wanted: int) -> Reading:
        """Return what is to be read, checked."""

    def rewind(self, length: int) -> None:
        """Forget all but the first tokens."""

    def copy(self, other: Any, length: int) -> None:
        """Hold the first tokens of another."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Tokens ids (n,) int64 that `decoder` is to read, with logits after the last `wanted`."""

    decoder: Reader
    ids: npt.NDArray[np.int64]
    wanted: int


class NativeBatch:
    """Texts beside each other; see `cvxq.lean.decoder.Batch`."""

    def __init__(self, decoder: Reader, texts: int) -> None:
        """Start with empty texts."""
        self._decoders = [decoder.sibling() for _ in range(texts)]
        self.capacity, self.vocabulary = decoder.capacity, decoder.vocabulary
        self.texts = texts

    def read(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> Floats:
        """Read tokens after the texts named; return logits (pieces, V) after the last of each."""
        readings = [self._decoders[text].begin(ids, 1) for text, ids in pieces]
        return np.concatenate(read_together(readings))

    def read_each(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> list[Floats]:
        """Read tokens after the texts named; return the logits (L, V) after each, by pieces."""
        return read_together([self._decoders[text].begin(ids, len(ids)) for text, ids in pieces])

    def rewind(self, text: int, length: int) -> None:
        """Forget all but the first `length` tokens of a text."""
        self._decoders[text].rewind(length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a text be the first `length` tokens of another."""
        self._decoders[target].copy(self._decoders[source], length)


def read_together(readings: Sequence[Reading]) -> list[Floats]:
    """Read; return the logits (wanted, V) of each."""
    first = readings[0].decoder
    results = [np.empty((r.wanted, first.vocabulary), np.float32) for r in readings]
    for call in _calls([len(reading.ids) for reading in readings], first.chunk):
        pieces, places = [], []
        for index, begin, end in call:
            reading = readings[index]
            before = len(reading.ids) - reading.wanted  # tokens without logits
            place = slice(max(begin, before) - before, max(end, before) - before)
            places.append((index, place))
            native, start = reading.decoder.native, reading.decoder.length
            pieces.append(Piece(native, reading.ids[begin:end], start, place.stop - place.start))
        logits = first.native.feed_together(pieces, first.exact)
        for (index, place), (_, begin, end) in zip(places, call, strict=True):
            readings[index].decoder.length += end - begin
            own, logits = np.split(logits, [place.stop - place.start])
            results[index][place] = own
    return results


def _calls(lengths: Sequence[int], room: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut texts of so many tokens into calls of at most `room` tokens, and of TEXTS texts.

    A call has (text, first token, end) of each piece.
    """
    call: list[tuple[int, int, int]] = []
    left = room
    for text, length in enumerate(lengths):
        begin = 0
        while begin < length:
            end = min(length, begin + left)
            call.append((text, begin, end))
            left -= end - begin
            begin = end
            if not left or len(call) == TEXTS:
                yield call
                call, left = [], room
    if call:
        yield call

"""What every lean decoder can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable
from weakref import ReferenceType

import numpy as np
import numpy.typing as npt

from cvxq.sample import SamplingSettings

if TYPE_CHECKING:
    import torch

    Floats: TypeAlias = npt.NDArray[np.float32] | torch.Tensor


@runtime_checkable
class Decoder(Protocol):
    """A model that holds the keys and values of one text.

    capacity: the most tokens of a text; length: how many it has read; vocabulary: V; end_tokens:
    that end a text; bytes_per_token: bytes of weights that predicting one token reads; holder: the
    session whose text it is, None before the first.
    """

    capacity: int
    length: int
    vocabulary: int
    end_tokens: frozenset[int]
    bytes_per_token: int
    holder: ReferenceType[object] | None

    def feed(self, ids: Sequence[int]) -> Floats:
        """Read `ids` (at least one) after the text; return logits (V,) float32 after the last."""

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read `ids` as a text of its own; return the logits (L, V) float32 after each of them."""

    def rows(self, ids: Sequence[int]) -> Floats:
        """Read `ids` after the text; return the logits (L, V) float32 after each of them."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def sibling(self) -> Decoder:
        """Return a decoder of the same weights with an empty text of its own."""


class Batch(Protocol):
    """Several texts of one model beside each other, read together.

    Each gets what it would get alone but for rounding, which may differ with the number of texts.
    texts: how many, 0 … texts − 1; capacity: the most tokens of each; vocabulary: V.
    """

    texts: int
    capacity: int
    vocabulary: int

    def read(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> Floats:
        """Read tokens, at least one, after each of the texts named; each is named once.

        Returns the logits (pieces, V) float32 after the last of each.
        """

    def read_each(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> Sequence[Floats]:
        """Read as `read` does; return the logits (L, V) float32 after each token, by pieces."""

    def rewind(self, text: int, length: int) -> None:
        """Forget all but the first `length` tokens of a text."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a text be the first `length` tokens of another."""


@runtime_checkable
class BatchingDecoder(Decoder, Protocol):
    """A decoder that also reads several texts together."""

    def batch(self, texts: int, tokens: int) -> Batch | None:
        """Return empty texts: up to `texts` and 16, as many of `tokens` as free memory holds twice.

        None where this model's texts cannot be read together.
        """


def as_array(values: Floats) -> npt.NDArray[np.float32]:
    """Return floats of any type and device as an array of float32."""
    return values if isinstance(values, np.ndarray) else values.float().cpu().numpy()


@runtime_checkable
class DrawingDecoder(Decoder, Protocol):
    """A decoder that also chooses tokens, where the logits are."""

    def draw(self, settings: SamplingSettings, ids: Sequence[int]) -> Iterator[int]:
        """Yield the tokens that follow the text just read (`ids`: all of it), until it is full.

        Each has been read when it is yielded, except one that no longer fits.
        """

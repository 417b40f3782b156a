"""What every lean decoder can do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    Floats: TypeAlias = npt.NDArray[np.float32] | torch.Tensor


class Decoder(Hashable, Protocol):
    """A model that holds the keys and values of one text.

    capacity: the most tokens of a text; length: how many it has read; vocabulary: V;
    bytes_per_token: bytes of weights that predicting one token reads.
    """

    capacity: int
    length: int
    vocabulary: int
    bytes_per_token: int

    def feed(self, ids: Sequence[int]) -> Floats:
        """Read `ids` (at least one) after the text; return logits (V,) float32 after the last."""

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read `ids` as a text of its own; return the logits (L, V) float32 after each of them."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

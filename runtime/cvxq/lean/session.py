"""A text read by a lean decoder, which holds the keys and values of one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary, ref

import numpy as np

from cvxq.lean.decoder import Decoder
from cvxq.session import Logits, Session

# Whose text a decoder holds: sessions that find another's there read their own anew.
_owner: WeakKeyDictionary[Decoder, ref[LeanSession]] = WeakKeyDictionary()


class LeanSession(Session):
    """A decoder in the middle of a text."""

    def __init__(self, decoder: Decoder) -> None:
        """Start with an empty text; the decoder's is forgotten when this one is first read."""
        super().__init__(decoder.capacity)
        self.decoder = decoder

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.ids[length:]

    def _read(self, ids: Sequence[int]) -> Logits:
        decoder = self.decoder
        owner = _owner.get(decoder)
        if owner is None or owner() is not self:
            _owner[decoder] = ref(self)
            decoder.rewind(0)
        held = min(decoder.length, len(self.ids))
        decoder.rewind(held)
        logits = decoder.feed([*self.ids[held:], *ids])
        self.ids.extend(ids)
        return logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()

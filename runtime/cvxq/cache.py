"""A text read by a network of transformers, whose keys and values are kept.

Long prompts are read in pieces, so that attention's temporaries stay bounded.  Where the length of
the text changes the angles of all its places (`cvxq.angles`), all of it is read anew: once for
longrope, for every token past the original length with dynamic scaling.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from cvxq import cuda
from cvxq.angles import Angles
from cvxq.config import reason
from cvxq.errors import CvxqError, UnsupportedModelError, is_out_of_memory
from cvxq.session import Logits, Session

PREFILL_TOKENS = 512  # read per forward pass


@contextmanager
def _told() -> Iterator[None]:
    """Raise UnsupportedModelError for what stops a network whose parts all seemed to fit.

    transformers uses many a value of a configuration only when it computes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CvxqError) or is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"the network that transformers makes of the file's config.json fails: {reason(error)}"
        ) from error


class NetworkSession(Session):
    """A network in the middle of a text."""

    def __init__(
        self,
        network: PreTrainedModel,
        context_length: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """Start with an empty text; `context_length` None means that there is no limit."""
        super().__init__(context_length)
        self.network = network
        self.prefill_tokens = prefill_tokens
        self._cache: Any = None
        self._angles = Angles(network)
        self._turned_by: bytes | None = None  # the angles of what is cached
        # Recurrent networks keep a state that cannot be rewound: they read everything anew.
        self._has_keys = self.can_rewind = not getattr(network, "_is_stateful", False)
        forward = inspect.signature(network.forward).parameters
        self._last_only: dict[str, Any] = (
            {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        )

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length >= len(self.ids):
            return
        if length > 0 and isinstance(self._cache, DynamicCache):
            self._cache.crop(length - len(self.ids))
        elif self._has_keys:  # nothing can be kept
            self._cache = None
            length = 0
        del self.ids[length:]

    @torch.inference_mode()
    def _read(self, ids: Sequence[int]) -> Logits:
        with _told(), self._angles.of(len(self.ids) + len(ids)) as angles:
            if not self._has_keys:
                logits = self._forward([*self.ids, *ids])
                self.ids.extend(ids)
                return logits
            if angles != self._turned_by or self._cache is None:
                ids = [*self.ids, *ids]
                self.ids.clear()
                self._cache, self._turned_by = DynamicCache(), angles
            return self._read_pieces(ids)

    def _read_pieces(self, ids: Sequence[int]) -> Logits:
        try:
            for start in range(0, len(ids), self.prefill_tokens):
                piece = ids[start : start + self.prefill_tokens]
                logits = self._forward(piece)
                self.ids.extend(piece)
        except BaseException:  # interrupted between two layers: their lengths may differ
            self._cache = None
            self.ids.clear()
            raise
        return logits

    def _forward(self, ids: Sequence[int]) -> Logits:
        device = self.network.device
        cuda.use(device)
        seen = len(ids) + (len(self.ids) if self._has_keys else 0)
        output = self.network(
            input_ids=torch.tensor([list(ids)], device=device),
            attention_mask=torch.ones((1, seen), dtype=torch.long, device=device),
            past_key_values=self._cache,
            use_cache=self._has_keys,
            **self._last_only,
        )
        if self._has_keys:
            self._cache = output.past_key_values
        logits: Logits = output.logits[0, -1].float().cpu().numpy()
        return logits

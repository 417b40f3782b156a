"""A text read by a lean decoder, which holds the keys and values of one text at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import ref

from cvxq.lean.decoder import Decoder, DrawingDecoder, as_array
from cvxq.sample import Sampler, SamplingSettings
from cvxq.session import Logits, Session, reseeded


class LeanSession(Session):
    """A decoder in the middle of a text."""

    def __init__(self, decoder: Decoder) -> None:
        """Start with an empty text; the decoder's is forgotten when this one is first read."""
        super().__init__(decoder.capacity)
        self.decoder = decoder

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.ids[length:]

    def _draw(
        self, ids: Sequence[int], settings: SamplingSettings, sampler: Sampler | None
    ) -> Iterator[int]:
        """Yield the tokens that follow the text `ids`, drawn by the decoder if it can."""
        decoder = self.decoder
        if sampler is not None or not isinstance(decoder, DrawingDecoder):
            yield from super()._draw(ids, settings, sampler)
            return
        self.resume(ids)
        text = list(ids)
        for token in decoder.draw(settings, ids):
            text.append(token)
            if decoder.length > len(self.ids):
                self.ids.append(token)
            yield token
            if not self._is_owner():  # another text was read meanwhile: begin anew from here
                if self.room:
                    yield from self._draw(text, reseeded(settings, len(text)), None)
                return
            self.check()

    def _is_owner(self) -> bool:
        """Tell whether what the decoder holds is of this text; else it is to be read anew."""
        holder = self.decoder.holder
        return holder is not None and holder() is self

    def _read(self, ids: Sequence[int]) -> Logits:
        missing = self._hold()
        logits = self.decoder.feed([*missing, *ids] if missing else ids)
        self.ids.extend(ids)
        return as_array(logits)

    def _read_each(self, ids: Sequence[int]) -> Logits:
        if missing := self._hold():
            self.decoder.feed(missing)
        logits = self.decoder.rows(ids)
        self.ids.extend(ids)
        return as_array(logits)

    def _hold(self) -> list[int]:
        """Let the decoder hold this text; return what at its end it has yet to read."""
        decoder = self.decoder
        if not self._is_owner():
            decoder.holder = ref(self)
            decoder.rewind(0)
        if decoder.length != len(self.ids):
            decoder.rewind(len(self.ids))
        return self.ids[decoder.length :]

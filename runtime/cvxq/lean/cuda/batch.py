"""Several texts on a GPU, side by side: a step reads one token of each, captured as one graph.

The cache holds the key heads of all texts one below the other, so that a step's kernels see more
heads, not more texts.  A step computes every text, also those that have nothing to read: what they
store is overwritten by their next token.  Prompts are read one text at a time, since their own rows
fill the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from cvxq import cuda
from cvxq.errors import ContextError
from cvxq.lean.cuda.network import KeyValueCache, TorchNetwork

PLACES_STEP = 64  # a cache's size is a multiple of this
TEXTS = 16  # most of a batch: more rows no longer cost the same


class TorchBatch:
    """Texts beside each other; see `cvxq.lean.decoder.Batch`."""

    def __init__(
        self,
        network: TorchNetwork,
        texts: int,
        tokens: int,
        prefill: Callable[
            [Sequence[int], bool, KeyValueCache, int], Iterator[tuple[int, torch.Tensor]]
        ],
        capture: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> None:
        """Start with empty texts of up to `tokens` tokens.

        prefill: reads tokens into a cache after so many, chunk by chunk, and yields the text's
        length and logits (n, V) of the chunk, or of its last token; capture: returns what launches
        a function.
        """
        self.texts, self.capacity, self.vocabulary = texts, tokens, network.record.vocabulary
        self._network, self._prefill, self._capture = network, prefill, capture
        self._lengths = [0] * texts
        device = network.device
        places = -(-(tokens + 1) // PLACES_STEP) * PLACES_STEP  # one for the idle
        self.cache = KeyValueCache(network.record, places, device, network.dtype, texts)
        self._tokens = torch.zeros(texts, dtype=torch.int64, device=device)
        self._positions = torch.zeros(texts, dtype=torch.int64, device=device)
        self._logits = torch.zeros(texts, network.record.vocabulary, device=device)
        self._launch: Callable[[], None] | None = None
        has_sinks = any(layer.attention.sinks for layer in network.record.layers)
        self._steps_together = not has_sinks  # which the kernel for one token lacks

    @torch.inference_mode()
    def read(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        """Read tokens after the texts named; return logits (pieces, V) float32 on the device."""
        cuda.use(self._network.device)
        self._check(pieces)
        result = self._logits.new_empty(len(pieces), self._logits.shape[1])
        single = []
        for index, (text, ids) in enumerate(pieces):
            if len(ids) == 1 and self._steps_together:
                single.append(index)
            else:
                *_, last = self._rows(text, ids, True)
                result[index] = last[-1]
        if single:
            self._step([(pieces[index][0], pieces[index][1][0]) for index in single])
            result[single] = self._logits[[pieces[index][0] for index in single]]
        return result

    @torch.inference_mode()
    def read_each(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Read tokens after the texts named; return logits (L, V) float32 in main memory."""
        cuda.use(self._network.device)
        self._check(pieces)
        return [
            torch.cat([rows.cpu() for rows in self._rows(text, ids, False)]) for text, ids in pieces
        ]

    def _check(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> None:
        for text, ids in pieces:
            if self._lengths[text] + len(ids) > self.capacity:
                raise ContextError(
                    f"a text's {self.capacity} tokens are full; begin a new one, or give it more"
                )

    def _rows(self, text: int, ids: Sequence[int], last_only: bool) -> Iterator[torch.Tensor]:
        """Read tokens after a text; yield logits (n, V) of each chunk, or of its last token."""
        cache, before = self.cache.text(text), self._lengths[text]
        for length, rows in self._prefill(ids, last_only, cache, before):
            self._lengths[text] = length
            yield rows

    def _step(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Read one token of each text named; leave the logits after it in `_logits`."""
        tokens = [0] * self.texts
        for text, token in pairs:
            tokens[text] = token
        self._tokens.copy_(torch.tensor(tokens))
        self._positions.copy_(torch.tensor(self._lengths))
        if self._launch is None:
            compute = self._compute
            self._launch = compute if self._network.waits else self._capture(compute)
        self._launch()
        for text, _ in pairs:
            self._lengths[text] += 1

    def _compute(self) -> None:
        logits = self._network.forward(self._tokens, self._positions, self.cache, None, False)
        self._logits.copy_(logits)

    def rewind(self, text: int, length: int) -> None:
        """Forget all but the first `length` tokens of a text."""
        self._lengths[text] = min(self._lengths[text], length)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Let a text be the first `length` tokens of another."""
        here, there = self.cache.text(target), self.cache.text(source)
        for mine, theirs in zip(
            (*here.keys, *here.values), (*there.keys, *there.values), strict=True
        ):
            mine[:, :length] = theirs[:, :length]
        self._lengths[target] = length

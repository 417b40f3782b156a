"""The lean decoder in torch, for GPUs: nothing waits for the host while it generates.

One token's step reads its inputs (token, position) from device memory and leaves its results
(logits, the next token, the next position) there, so on CUDA it is captured once as a graph and
then replayed; one launch replaces a thousand.  `draw` keeps one step ahead of whoever reads the
tokens: while the host looks at one token, the device computes the next.  Prompts are read in
chunks, launched one operation at a time.

The cache has room for FIRST_PLACES tokens from the start, grows at once to what a call of `draw`
can need, and otherwise doubles when it is full, up to the model's own context.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from weakref import ReferenceType

import torch

from cvxq import cuda
from cvxq.cache_size import bytes_per_token
from cvxq.errors import ContextError
from cvxq.lean.cuda.batch import PLACES_STEP, TEXTS, TorchBatch
from cvxq.lean.cuda.network import KeyValueCache, TorchNetwork
from cvxq.lean.cuda.sample import DeviceSampler
from cvxq.lean.rope import Turning
from cvxq.sample import SamplingSettings

PREFILL_TOKENS = 512  # read at a time
FIRST_PLACES = 1024  # of the cache
LOGITS = 1 << 24  # of several tokens at once, 64 MiB of float32
_ALIGNMENT = 16  # and the places that a prompt looks at of this, since kernels like aligned masks


def warn(message: str) -> None:
    """Tell the user in one line; the default of TorchDecoder's `notify`."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


class TorchDecoder:
    """A network with the keys and values of one text; see `lean.decoder.Decoder`."""

    def __init__(
        self,
        network: TorchNetwork,
        prefill_tokens: int = PREFILL_TOKENS,
        notify: Callable[[str], None] = warn,
    ) -> None:
        """Start with an empty text; `notify` gets one line when CUDA graphs cannot be used."""
        self.network = network
        self.capacity = network.record.context
        self.vocabulary = network.record.vocabulary
        self.end_tokens = frozenset(network.record.end_tokens)
        self.bytes_per_token = network.weights.bytes_per_token(network.record)
        self.length = 0
        self.holder: ReferenceType[object] | None = None
        self.prefill_tokens = prefill_tokens
        self._notify = notify
        self._turning = Turning(network.record.ropes)
        device = network.device
        places = _rounded(min(FIRST_PLACES, self.capacity))
        self.cache = KeyValueCache(network.record, places, device, network.dtype)
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits = torch.zeros(self.vocabulary, device=device)
        self._is_cuda = self._uses_graphs = device.type == "cuda"
        self._step_launch: Callable[[], None] | None = None
        self._sampler: tuple[DeviceSampler, Callable[[], None]] | None = None

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        """Read `ids` (at least one) after the text; return logits (V,) float32 on the device.

        The next call overwrites them.  Raises ContextError when they do not fit.
        """
        cuda.use(self.network.device)
        self._make_room(len(ids))
        if self._turning.crosses(self.length + len(ids)):
            ids = self._cross(ids)
        self._turning.extend(self.length, ids)
        if len(ids) == 1:
            self._token.fill_(ids[0])
            self._step()
        else:
            for length, logits in self._prefill(ids, True, self.cache, self.length):
                self.length = length
                self._logits.copy_(logits[-1])
        return self._logits

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Read `ids` as a text of its own; return logits (L, V) float32 in main memory."""
        self.rewind(0)
        result = self.rows(ids)
        self.rewind(0)  # nobody's text
        return result

    @torch.inference_mode()
    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """Read `ids` after the text; return logits (L, V) float32 in main memory."""
        cuda.use(self.network.device)
        self._make_room(len(ids))
        text = self._cross(ids) if self._turning.crosses(self.length + len(ids)) else ids
        self._turning.extend(self.length, text)
        start = self.length
        result = torch.empty(len(text), self.vocabulary)
        for length, logits in self._prefill(text, False, self.cache, start):
            self.length = length
            result[length - start - len(logits) : length - start] = logits
        return result[-len(ids) :]

    def _cross(self, ids: Sequence[int]) -> list[int]:
        """Forget the text, which is turned by other tables from now on; return what to read."""
        text = self._turning.cross(self.length, ids)
        self.cache.turn(self._turning.is_long)
        self.length = 0
        return text

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def sibling(self) -> TorchDecoder:
        """Return a decoder of the same weights with an empty text of its own."""
        other = TorchDecoder(self.network, self.prefill_tokens, self._notify)
        other.capacity = self.capacity
        return other

    def batch(self, texts: int, tokens: int) -> TorchBatch | None:
        """Return up to `texts` texts of `tokens` tokens, as many as half of free memory holds.

        None for a model whose long texts are turned in another way: they would have to be read
        anew.
        """
        if self._turning.switches:
            return None
        per_text = tokens * bytes_per_token(self.network.record) // 4 * self.network.dtype.itemsize
        free = cuda.free_bytes(self.network.device) if self._is_cuda else texts * 2 * per_text
        texts = max(1, min(texts, TEXTS, free // (2 * per_text)))
        return TorchBatch(self.network, texts, tokens, self._prefill, self._captured)

    @torch.inference_mode()
    def draw(self, settings: SamplingSettings, ids: Sequence[int]) -> Iterator[int]:
        """Yield the tokens that follow the text just read (`ids`: all of it), without end.

        Each token but one that fills the context has been read when it is yielded.  The first
        comes from the logits of the last `feed`.
        """
        cuda.use(self.network.device)
        if settings.max_tokens is not None:
            self._make_room(min(settings.max_tokens, self.capacity - self.length))
        sampler, choose = self._prepared(settings)
        sampler.restart(settings.seed, ids)
        shown = torch.zeros(1, dtype=torch.int64, pin_memory=self._is_cuda)
        choose()
        while True:
            cuda.use(self.network.device)  # another thread may have asked for this token
            shown.copy_(self._token, non_blocking=True)
            arrived = self._mark()
            is_full = self.length == self.capacity
            length = self.length
            if not is_full:
                self._make_room(1)
                if self._turning.crosses(length + 1):  # once: all is read anew
                    self.feed([int(self._token)])
                else:  # the device goes on while the host waits for this token only
                    self._step()
                choose()
            arrived()
            self._turning.extend(length, [int(shown)])
            yield int(shown)
            if is_full:
                return

    def _step(self) -> None:
        """Read the token in `_token` and leave the logits after it in `_logits`."""
        self._position.fill_(self.length)
        if self._step_launch is None:
            compute = self._compute_step
            self._step_launch = compute if self.network.waits else self._captured(compute)
        self._step_launch()
        self.length += 1

    def _compute_step(self) -> None:
        finds_length = self._is_cuda and not self.network.waits
        length = None if finds_length else self.length + 1
        logits = self.network.forward(self._token, self._position, self.cache, length)
        self._logits.copy_(logits[0])

    def _prefill(
        self, ids: Sequence[int], last_only: bool, cache: KeyValueCache, length: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Read `ids` after `length` tokens of a text in `cache`, chunk by chunk.

        Yields the text's length and the logits of each chunk, or of its last token.
        """
        device = self.network.device
        tokens = torch.tensor(ids, device=device)
        most = self.prefill_tokens if last_only else max(1, LOGITS // self.vocabulary)
        for chunk in tokens.split(min(self.prefill_tokens, most)):
            positions = torch.arange(length, length + len(chunk), device=device)
            length += len(chunk)
            seen = -(-length // _ALIGNMENT) * _ALIGNMENT
            yield length, self.network.forward(chunk, positions, cache, seen, last_only)

    def _make_room(self, count: int) -> None:
        """Let the cache have room for `count` tokens more."""
        wanted = self.length + count
        if wanted > self.capacity:
            raise ContextError(
                f"the model's context of {self.capacity} tokens is full; begin a new text"
            )
        if wanted > self.cache.places:
            doubled = min(2 * self.cache.places, self.capacity)
            self._step_launch = None  # its graph holds the old addresses
            self.cache.grow(_rounded(max(wanted, doubled)), self.length)

    def _prepared(self, settings: SamplingSettings) -> tuple[DeviceSampler, Callable[[], None]]:
        """Return a sampler for `settings`, and what launches its choice; the last one is kept."""
        rules = replace(settings, seed=None, max_tokens=None, stop=())
        if self._sampler is None or self._sampler[0].settings != rules:
            sampler = DeviceSampler(rules, self.vocabulary, self.network.device)

            def choose() -> None:
                sampler.choose(self._logits, self._token)

            self._sampler = sampler, self._captured(choose, sampler.generator)
        return self._sampler

    def _captured(
        self, compute: Callable[[], None], generator: torch.Generator | None = None
    ) -> Callable[[], None]:
        """Return what launches `compute`: a graph of it where there are graphs, else itself."""
        if not self._uses_graphs:
            return compute
        try:
            return cuda.capture(compute, generator)
        except torch.OutOfMemoryError:
            raise  # it would be no smaller without a graph
        except RuntimeError as error:
            self._uses_graphs = False
            self._notify(
                "CUDA graphs cannot be used here, so every operation is launched by itself, which "
                f"is slower ({str(error).splitlines()[0]})"
            )
            return compute

    def _mark(self) -> Callable[[], None]:
        """Return a function that waits until the device has done what was launched so far."""
        return cuda.mark() if self._is_cuda else lambda: None


def _rounded(places: int) -> int:
    return -(-places // PLACES_STEP) * PLACES_STEP

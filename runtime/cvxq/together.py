"""Answers to several prompts, written side by side.

Every pass of the model reads one token of each text that is being written, or the whole prompt of
one that begins.  Where a text ends, the next prompt takes its place.  What a prompt has in common
with what another place has read is copied, not read again: the solved examples before each question
of a benchmark, for instance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from cvxq.errors import ArgumentError, ContextError
from cvxq.generate import Answer, Generation
from cvxq.lean.decoder import Batch, as_array
from cvxq.sample import Sampler, SamplingSettings
from cvxq.specials import TextTokenizer
from cvxq.stream import shared_length

_WORTH_WAITING = 16  # tokens that another text is about to read, to be copied then


@dataclass(frozen=True)
class Order:
    """A text to be continued: tokens of the prompt, rules, tokens that end it."""

    prompt_ids: Sequence[int]
    settings: SamplingSettings
    end_ids: Collection[int]


class _Place:
    """One of the texts of a batch: what it has read, what is next, and the answer it is for."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.read: list[int] = []
        self.next: list[int] = []
        self.answer: Answer | None = None
        self.index = 0

    def begin(self, index: int, order: Order, tokenizer: TextTokenizer) -> None:
        """Write the answer to an order from now on; `read` is the beginning of its prompt."""
        self.index, self.next = index, list(order.prompt_ids[len(self.read) :])
        self.answer = Answer(tokenizer, order.prompt_ids, order.settings, order.end_ids)
        self._sampler = Sampler(order.settings)

    def choose(self, logits: Sequence[float]) -> bool:
        """Take note that `next` was read, and choose what follows; tell whether the text ends."""
        assert self.answer is not None
        self.read += self.next
        self.next = [self._sampler.choose(logits, self.read)]  # type: ignore[arg-type]
        return self.answer.push(self.next[0])


def generate_together(
    batch: Batch, tokenizer: TextTokenizer, orders: Sequence[Order]
) -> Iterator[tuple[int, Generation]]:
    """Yield the answers to `orders`, each with its number, as they end.

    They are what `generate_text` gives for each, but for the rounding of logits.  Raises
    ContextError for a prompt that does not fit, ArgumentError for one without tokens.
    """
    for order in orders:
        _check(order.prompt_ids, batch.capacity)
    waiting = deque(enumerate(orders))
    places = [_Place(number) for number in range(batch.texts)]
    while True:
        _begin(batch, places, waiting, tokenizer)
        busy = [place for place in places if place.answer is not None]
        if not busy:
            return
        logits = as_array(batch.read([(place.number, place.next) for place in busy]))
        for place, row in zip(busy, logits, strict=True):
            ends = place.choose(row)
            if (ends or len(place.read) == batch.capacity) and place.answer is not None:
                yield place.index, place.answer.finish()
                place.answer, place.next = None, []


def _check(prompt: Sequence[int], capacity: int) -> None:
    if not prompt:
        raise ArgumentError("the prompt has no tokens; give at least one")
    if len(prompt) > capacity:
        raise ContextError(
            f"the prompt has {len(prompt)} tokens, but the model's context holds {capacity}; "
            "shorten it, or give it more with --context"
        )


def _begin(
    batch: Batch,
    places: Sequence[_Place],
    waiting: deque[tuple[int, Order]],
    tokenizer: TextTokenizer,
) -> None:
    """Let free places take the next orders, unless what they begin with is being read just now."""
    for place in places:
        if place.answer is not None or not waiting:
            continue
        index, order = waiting[0]
        prompt = order.prompt_ids[:-1]
        known = {other: shared_length(other.read, prompt) for other in places}
        soon = max(shared_length([*other.read, *other.next], prompt) for other in places)
        source = max(places, key=lambda other: (known[other], other is place))
        if soon - known[source] > _WORTH_WAITING:
            return
        if source is place:
            batch.rewind(place.number, known[place])
        else:
            batch.copy(source.number, place.number, known[source])
        place.read = list(prompt[: known[source]])
        place.begin(index, order, tokenizer)
        waiting.popleft()

"""How likely endings of texts are, of several texts side by side.

Endings that follow the same tokens (the choices of a question) share them: they are read once and
copied, as is what the texts of a batch have in common with those before them. The endings are then
read together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvxq.errors import ArgumentError, ContextError
from cvxq.lean.decoder import Batch, as_array
from cvxq.stream import shared_length

Logits = npt.NDArray[np.float32]
Tokens = tuple[int, ...]

_LOGITS = 1 << 25  # that are held at once: 128 MiB
_WORTH_A_PASS = 16  # tokens that several texts begin with, to be read once before them


@dataclass(frozen=True)
class Score:
    """Of tokens: their log-likelihood in nats, and whether each was the likeliest."""

    value: float
    is_likeliest: bool

    def __add__(self, other: Score) -> Score:
        """Of these tokens and those."""
        return Score(self.value + other.value, self.is_likeliest and other.is_likeliest)


@dataclass(frozen=True)
class Ending:
    """Tokens given, and tokens to be scored after them; at least one of both."""

    given: Tokens
    scored: Tokens

    def __post_init__(self) -> None:
        """Raise ArgumentError for none of either."""
        if not self.given or not self.scored:
            raise ArgumentError("nothing to score or nothing before it; give at least one token")

    @property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """Both, to be sorted by."""
        return self.given, self.scored

    @property
    def length(self) -> int:
        """Tokens that are read: the last one is not."""
        return len(self.given) + len(self.scored) - 1


def score(logits: Logits, tokens: Sequence[int]) -> Score:
    """Score tokens (n,) by the logits (n, V) float32 before each."""
    values = logits - logits.max(-1, keepdims=True)
    chosen = values[np.arange(len(tokens)), tokens].astype(np.float64)
    sums = np.exp(values).sum(-1, dtype=np.float64)
    return Score(float((chosen - np.log(sums)).sum()), bool((chosen == 0).all()))


def in_order(endings: Sequence[Ending]) -> list[int]:
    """Numbers of endings so that those of the same beginning follow each other."""
    return sorted(range(len(endings)), key=lambda index: endings[index].tokens)


def score_together(batch: Batch, endings: Sequence[Ending]) -> Iterator[tuple[int, Score]]:
    """Yield the scores of `endings`, each with its number, those of the same beginning together.

    They are what one after the other would give but for the rounding of logits. Raises ContextError
    for one that does not fit.
    """
    longest = max((ending.length for ending in endings), default=0)
    if longest > batch.capacity:
        raise ContextError(
            f"{longest} tokens are to be read, but the model's context holds {batch.capacity}; "
            "shorten them, or give it more with --context"
        )
    order = in_order(endings)
    texts = _Texts(batch)
    for first in range(0, len(order), batch.texts):
        lot = order[first : first + batch.texts]
        yield from zip(lot, _scores(texts, [endings[index] for index in lot]), strict=True)


class _Texts:
    """The texts of a batch, and what each has read."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.have: list[Tokens] = [()] * batch.texts

    def known(self, tokens: Tokens) -> tuple[int, int]:
        """How many of `tokens` a text begins with, and which: the one with the most."""
        lengths = [shared_length(have, tokens) for have in self.have]
        text = max(range(len(lengths)), key=lengths.__getitem__)
        return lengths[text], text

    def take(self, text: int, tokens: Tokens) -> None:
        """Let a text be as much of `tokens` as any has read."""
        length, source = self.known(tokens)
        if shared_length(self.have[text], tokens) == length:
            self.batch.rewind(text, length)
        else:
            self.batch.copy(source, text, length)
        self.have[text] = tokens[:length]

    def read_up_to(self, wanted: Mapping[int, Tokens]) -> Logits:
        """Read what texts lack of `wanted`, at least a token; return logits (texts, V) after it."""
        pieces = [(text, tokens[len(self.have[text]) :]) for text, tokens in wanted.items()]
        self.have = [wanted.get(text, have) for text, have in enumerate(self.have)]
        return as_array(self.batch.read(pieces))

    def read_each(self, pieces: Sequence[tuple[int, Tokens]]) -> list[Logits]:
        """Read tokens after the texts named; return the logits (n, V) after each, text by text."""
        for text, tokens in pieces:
            self.have[text] += tokens
        return [as_array(rows) for rows in self.batch.read_each(pieces)]


def _scores(texts: _Texts, endings: Sequence[Ending]) -> list[Score]:
    """Read endings, each in the text of its number, and return their scores."""
    after = _read_given(texts, [ending.given for ending in endings])
    scores = [score(after[e.given][None], e.scored[:1]) for e in endings]
    done = [0] * len(endings)
    while True:
        left = [text for text, e in enumerate(endings) if done[text] < len(e.scored) - 1]
        if not left:
            return scores
        most = max(1, _LOGITS // (texts.batch.vocabulary * len(left)))
        pieces = [(text, endings[text].scored[done[text] : -1][:most]) for text in left]
        for (text, piece), rows in zip(pieces, texts.read_each(pieces), strict=True):
            done[text] += len(piece)
            following = endings[text].scored[: done[text] + 1][-len(piece) :]
            scores[text] += score(rows, following)


def _read_given(texts: _Texts, given: Sequence[Tokens]) -> dict[Tokens, Logits]:
    """Read what sorted endings follow, the same once; return the logits (V,) after it."""
    leaders = {tokens: text for text, tokens in reversed([*enumerate(given)])}
    common = given[0][: shared_length(given[0][:-1], given[-1][:-1])]
    if len(leaders) > 1 and len(common) - texts.known(common)[0] > _WORTH_A_PASS:
        texts.take(0, common)
        texts.read_up_to({0: common})
    for tokens, text in leaders.items():
        texts.take(text, tokens[:-1])
    rows = texts.read_up_to({text: tokens for tokens, text in leaders.items()})
    for text, tokens in enumerate(given):
        texts.take(text, tokens)
    return dict(zip(leaders, rows, strict=True))

"""An answer as it is generated, in the decoder's thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cvxq.generate import FinishReason, generate_text
from cvxq.sample import Constraint, Floats, Sampler, SamplingSettings
from cvxq.serve.engine import Job
from cvxq.serve.served import Served


@dataclass(frozen=True)
class Order:
    """What one choice is generated from.

    end_ids: tokens that end it; kept: texts whose special tokens are part of it; top: how many of
    the likeliest tokens to tell with each one, None for no log probabilities at all; grammar: makes
    what it has to follow.
    """

    ids: Sequence[int]
    settings: SamplingSettings
    end_ids: frozenset[int]
    kept: tuple[str, ...] = ()
    top: int | None = None
    grammar: Callable[[], Constraint] | None = None


@dataclass(frozen=True)
class Scored:
    """A token, its log probability (None for the first of a text), and the likeliest ones there."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text of a choice, and the tokens scored since the piece before."""

    choice: int
    text: str
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of a choice: why, the last tokens scored, and numbers of tokens."""

    choice: int
    finish: FinishReason
    scored: tuple[Scored, ...]
    prompt_tokens: int
    reused_tokens: int
    drawn_tokens: int


def generate_choices(served: Served, orders: Sequence[Order]) -> Callable[[Job], None]:
    """Return the work of a job that emits pieces and ends of choices, one after the other."""

    def work(job: Job) -> None:
        for choice, order in enumerate(orders):
            generate_choice(served, order, choice, job)

    return work


def score_prompt(served: Served, order: Order, job: Job) -> list[Scored]:
    """Return every token of a prompt with its log probability."""
    session = served.caches.take(order.ids)
    session.check = job.check
    found = [Scored(order.ids[0], None)]
    place = 1
    for rows in session.score(order.ids):
        for logits in rows[: len(order.ids) - place]:
            found.append(score(logits, order.ids[place], order.top or 0))
            place += 1
    return found


def score(logits: Floats, token: int, top: int) -> Scored:
    """Return the log probability of `token`, and of the `top` likeliest, by logits (V,)."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    best = np.argpartition(-exact, top)[:top] if 0 < top < len(exact) else np.arange(0)
    ordered = sorted(best.tolist(), key=lambda other: -exact[other])
    return Scored(token, float(exact[token]), tuple((t, float(exact[t])) for t in ordered))


class _ScoringSampler(Sampler):
    """A sampler that notes the log probabilities that the model itself gives its tokens."""

    def __init__(self, settings: SamplingSettings, constraint: Constraint | None, top: int) -> None:
        super().__init__(settings, constraint)
        self._top = top
        self._scored: list[Scored] = []

    def choose(self, logits: Floats, ids: Sequence[int]) -> int:
        token = super().choose(logits, ids)
        self._scored.append(score(logits, token, self._top))
        return token

    def taken(self) -> tuple[Scored, ...]:
        """Return what was noted since the last call."""
        scored, self._scored = tuple(self._scored), []
        return scored


def generate_choice(served: Served, order: Order, choice: int, job: Job) -> None:
    """Generate one choice, emitting its pieces and its end."""
    session = served.caches.take(order.ids)
    session.check = job.check
    reused = session.reusable(order.ids)
    constraint = order.grammar() if order.grammar else None
    scoring = None if order.top is None else _ScoringSampler(order.settings, constraint, order.top)
    sampler = scoring or (Sampler(order.settings, constraint) if constraint else None)

    def taken() -> tuple[Scored, ...]:
        return scoring.taken() if scoring else ()

    is_first = True

    def send(text: str) -> None:
        nonlocal is_first
        if is_first:
            served.metrics.first_token_seconds.observe(time.monotonic() - job.submitted)
            is_first = False
        job.emit(Piece(choice, text, taken()))

    result = generate_text(
        session,
        served.tokenizer,
        order.ids,
        order.settings,
        order.end_ids,
        send,
        order.kept,
        sampler,
    )
    counts = len(order.ids), reused, len(result.ids)
    served.count(*counts)
    job.emit(Ended(choice, result.finish, taken(), *counts))

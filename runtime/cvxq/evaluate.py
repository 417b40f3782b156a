"""Perplexity, and divergence from the original, over windows of a text.

The whole text is tokenized once and cut into windows of the model's context.  Where the tokenizer
puts a start token (BOS) before a text, every window begins with it, since some models read no
text without; it takes one place of the context and is not scored, and every token of the text
after it is.  Else, as in published tables, every token of a window but the first is scored.  What
is left at the end is dropped, unless it is all there is.  With a smaller stride the windows
overlap, each scores only tokens that no earlier one did, and nothing is dropped.

Standard errors treat tokens as independent: s / √n, s the sample standard deviation.  Log
probabilities are taken in float64, a bounded number of positions at a time; of each token only
a few numbers are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from cvxq.errors import ArgumentError
from cvxq.lean.decoder import Decoder, as_array
from cvxq.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from cvxq.lean.decoder import Floats

    Predictor: TypeAlias = PreTrainedModel | Decoder

CHUNK_LOGITS = 1 << 18  # logits in float64 at a time: 2 MB for each network, which caches hold

Ids = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """Tokens `ids` (L,) int64, of which those from index `first_scored` ≥ 1 on are scored."""

    ids: Ids
    first_scored: int

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first_scored


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error (infinite for a single token)."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Doubles) -> Estimate:
        """Estimate from values (n,) float64, one per token."""
        count = len(values)
        error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
        return cls(float(values.mean()), error)


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity exp(nll) ± its standard error; nll in nats per token over `tokens` tokens."""

    nll: Estimate
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return math.exp(self.nll.mean)

    @property
    def standard_error(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.nll.standard_error


@dataclass(frozen=True)
class DivergenceResult:
    """How far the network's next-token distributions are from the original's.

    kl: KL(original ‖ network) in nats per token, with its median and percentiles over tokens;
    same_top: share of tokens for which both find the same one likeliest; perplexity and
    original_perplexity: of the two networks on the same tokens, nll_increase: from the one to the
    other.
    """

    kl: Estimate
    kl_median: float
    kl_p90: float
    kl_p99: float
    same_top: Estimate
    tokens: int
    perplexity: PerplexityResult
    original_perplexity: PerplexityResult
    nll_increase: Estimate


def token_ids(tokenizer: Any, text: str, with_special_tokens: bool = True) -> list[int]:
    """Tokenize all of `text`, with the special tokens that the tokenizer adds by default or not."""
    found = tokenizer(text, add_special_tokens=with_special_tokens, verbose=False)
    ids: list[int] = found["input_ids"]
    return ids


def windows(
    ids: Sequence[int], context: int, stride: int | None = None, start: Sequence[int] = ()
) -> list[Window]:
    """Cut `ids` into windows of `context` tokens, `stride` apart (default: end to end).

    start: tokens that every window begins with, counted in its context; then all `ids` (given
    without them) are scored, else all but those that no token of their window stands before.
    Raises ArgumentError when there is no token to score, or for a context without room or a stride
    that would leave tokens out.
    """
    least, length = max(2, len(start) + 1), context - len(start)
    if context < least:
        raise ArgumentError(f"context is {context} tokens, allowed: {least} or more")
    if stride is not None and not 1 <= stride <= length:
        raise ArgumentError(
            f"stride is {stride}, allowed: 1 to {length}, the tokens of the text in a window"
        )
    needed = 1 if start else 2
    if len(ids) < needed:
        raise ArgumentError(
            f"the text has {len(ids)} tokens; at least {needed} are needed to score one"
        )
    text, first = (np.array(tokens, np.int64) for tokens in (ids, start))
    return list(_windows(text, length, stride or length, first))


def _windows(ids: Ids, length: int, stride: int, start: Ids) -> Iterator[Window]:
    unpredicted = 0 if len(start) else 1  # tokens of a window that nothing stands before
    scored = 0  # tokens of the text up to here are done with
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        if stride == length and end - begin < length and begin > 0:
            return
        skipped = max(scored - begin, unpredicted)
        yield Window(np.concatenate([start, ids[begin:end]]), len(start) + skipped)
        scored = end
        if end == len(ids):
            return


def perplexity(
    network: Predictor, windows: Iterable[Window], progress: Progress | None = None
) -> PerplexityResult:
    """Measure the perplexity of `network` on the scored tokens of `windows`."""
    losses = []
    for window in _counted(windows, progress):
        logits = _logits(network, window)
        losses += [_nll(part, goal) for part, goal in _chunks(window, logits)]
    return _perplexity(_joined(losses))


def divergence(
    network: Predictor,
    original: Predictor,
    windows: Iterable[Window],
    progress: Progress | None = None,
) -> DivergenceResult:
    """Measure how far `network` is from `original` at the scored tokens of `windows`.

    Raises ArgumentError when their vocabularies differ in size.
    """
    columns: list[Doubles] = []  # per chunk: (4, n) kl, same top, both losses
    for window in _counted(windows, progress):
        ours, theirs = _logits(network, window), _logits(original, window)
        if ours.shape != theirs.shape:
            raise ArgumentError(
                f"the vocabularies differ: {ours.shape[-1]} tokens, the original "
                f"{theirs.shape[-1]}; compare with the model that the file was made of"
            )
        for (q, goal), (p, _) in zip(_chunks(window, ours), _chunks(window, theirs), strict=True):
            same_top = p.argmax(-1) == q.argmax(-1)
            columns.append(np.stack([_kl(p, q), same_top, _nll(q, goal), _nll(p, goal)]))
    kl, same, nll, original_nll = _joined(columns)
    median, p90, p99 = (float(np.quantile(kl, share)) for share in (0.5, 0.9, 0.99))
    return DivergenceResult(
        kl=Estimate.of(kl),
        kl_median=median,
        kl_p90=p90,
        kl_p99=p99,
        same_top=Estimate.of(same),
        tokens=len(kl),
        perplexity=_perplexity(nll),
        original_perplexity=_perplexity(original_nll),
        nll_increase=Estimate.of(nll - original_nll),
    )


def _counted(windows: Iterable[Window], progress: Progress | None) -> Iterator[Window]:
    """Yield the windows, telling `progress` about each that is done."""
    chosen = list(windows)
    for index, window in enumerate(chosen):
        yield window
        if progress is not None:
            progress("evaluate", index + 1, len(chosen))


def _logits(network: Predictor, window: Window) -> Floats:
    """Logits (n, V) that predict the n scored tokens of the window."""
    if isinstance(network, Decoder):
        return network.logits(window.ids.tolist())[window.first_scored - 1 : -1]
    import torch

    from cvxq.angles import Angles

    ids = torch.from_numpy(window.ids)[None].to(cast(torch.device, network.device))
    with torch.inference_mode(), Angles(network).of(len(window.ids)):
        output = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits: torch.Tensor = output.logits[0, window.first_scored - 1 : -1]
    return logits


def _chunks(window: Window, logits: Floats) -> Iterator[tuple[Doubles, Ids]]:
    """Yield log probabilities (m, V), and the tokens (m,) that came."""
    goals = window.ids[window.first_scored :]
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    for begin in range(0, len(goals), rows):
        part = as_array(logits[begin : begin + rows]).astype(np.float64)
        part -= part.max(-1, keepdims=True)
        part -= np.log(np.exp(part).sum(-1, keepdims=True))
        yield part, goals[begin : begin + rows]


def _nll(log_probabilities: Doubles, goal: Ids) -> Doubles:
    """Negative log likelihood (m,) of the tokens that came, in nats."""
    return -log_probabilities[np.arange(len(goal)), goal]


def _kl(p: Doubles, q: Doubles) -> Doubles:
    """KL(p ‖ q) (m,) of distributions whose logarithms (m, V) are given, in nats."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(p) * (p - q)
    terms[np.isneginf(p)] = 0  # what cannot come costs nothing
    sums: Doubles = terms.sum(-1)
    return sums


def _perplexity(losses: Doubles) -> PerplexityResult:
    return PerplexityResult(Estimate.of(losses), len(losses))


def _joined(chunks: list[Doubles]) -> Doubles:
    """Join (n,) or (4, n) per chunk along n."""
    if not chunks:
        raise ArgumentError("there are no windows to evaluate; give a text of at least 2 tokens")
    return np.concatenate(chunks, axis=-1)

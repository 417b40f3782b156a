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

import torch
from torch import nn

from cvxq.angles import Angles
from cvxq.errors import ArgumentError
from cvxq.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cvxq.lean import Decoder

    Predictor: TypeAlias = PreTrainedModel | Decoder

CHUNK_LOGITS = 1 << 22  # logits in float64 at a time: 32 MB for each network


@dataclass(frozen=True)
class Window:
    """Tokens `ids` (L,) int64, of which those from index `first_scored` ≥ 1 on are scored."""

    ids: torch.Tensor
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
    def of(cls, values: torch.Tensor) -> Estimate:
        """Estimate from values (n,) float64, one per token."""
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
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
    original_perplexity: of the two networks on the same tokens.
    """

    kl: Estimate
    kl_median: float
    kl_p90: float
    kl_p99: float
    same_top: Estimate
    tokens: int
    perplexity: PerplexityResult
    original_perplexity: PerplexityResult


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
    text, first = (torch.tensor(list(tokens), dtype=torch.int64) for tokens in (ids, start))
    return list(_windows(text, length, stride or length, first))


def _windows(ids: torch.Tensor, length: int, stride: int, start: torch.Tensor) -> Iterator[Window]:
    unpredicted = 0 if len(start) else 1  # tokens of a window that nothing stands before
    scored = 0  # tokens of the text up to here are done with
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        if stride == length and end - begin < length and begin > 0:
            return
        skipped = max(scored - begin, unpredicted)
        yield Window(torch.cat([start, ids[begin:end]]), len(start) + skipped)
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
        losses.append(torch.cat([_nll(part, goal) for part, goal in _chunks(window, logits)]))
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
    columns: list[torch.Tensor] = []  # per chunk: (4, n) kl, same top, both losses
    for window in _counted(windows, progress):
        ours, theirs = _logits(network, window), _logits(original, window)
        if ours.shape != theirs.shape:
            raise ArgumentError(
                f"the vocabularies differ: {ours.shape[-1]} tokens, the original {theirs.shape[-1]}"
            )
        for (q, goal), (p, _) in zip(_chunks(window, ours), _chunks(window, theirs), strict=True):
            columns.append(
                torch.stack(
                    [
                        (p.exp() * (p - q)).nan_to_num(nan=0.0).sum(-1),
                        (p.argmax(-1) == q.argmax(-1)).double(),
                        _nll(q, goal),
                        _nll(p, goal),
                    ]
                )
            )
    kl, same, nll, original_nll = torch.cat(columns, dim=1) if columns else _joined([])
    median, p90, p99 = (float(kl.quantile(share)) for share in (0.5, 0.9, 0.99))
    return DivergenceResult(
        kl=Estimate.of(kl),
        kl_median=median,
        kl_p90=p90,
        kl_p99=p99,
        same_top=Estimate.of(same),
        tokens=len(kl),
        perplexity=_perplexity(nll),
        original_perplexity=_perplexity(original_nll),
    )


def _counted(windows: Iterable[Window], progress: Progress | None) -> Iterator[Window]:
    """Yield the windows, telling `progress` about each that is done."""
    chosen = list(windows)
    for index, window in enumerate(chosen):
        yield window
        if progress is not None:
            progress("evaluate", index + 1, len(chosen))


@torch.inference_mode()
def _logits(network: Predictor, window: Window) -> torch.Tensor:
    """Logits (n, V) that predict the n scored tokens of the window."""
    if not isinstance(network, nn.Module):
        every = torch.as_tensor(network.logits(window.ids.tolist()))
        return every[window.first_scored - 1 : -1]
    ids = window.ids[None].to(cast(torch.device, network.device))
    with Angles(network).of(len(window.ids)):
        output = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits: torch.Tensor = output.logits[0, window.first_scored - 1 : -1]
    return logits


def _chunks(window: Window, logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield log probabilities (m, V) float64 on the CPU, and the tokens (m,) that came."""
    goals = window.ids[window.first_scored :]
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    for part, goal in zip(logits.split(rows), goals.split(rows), strict=True):
        yield part.cpu().double().log_softmax(-1), goal


def _nll(log_probabilities: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood (m,) of the tokens that came, in nats."""
    return -log_probabilities.gather(1, goal[:, None])[:, 0]


def _perplexity(losses: torch.Tensor) -> PerplexityResult:
    return PerplexityResult(Estimate.of(losses), len(losses))


def _joined(losses: list[torch.Tensor]) -> torch.Tensor:
    if not losses:
        raise ArgumentError("there are no windows to evaluate; give a text of at least 2 tokens")
    return torch.cat(losses)

"""Drawing a token where the logits are, with the rules of `cvxq.sample`.

The draw is a race: each token's probability is divided by an exponential variable of its own, and
the largest quotient wins, which happens with exactly that probability and needs neither a sum over
the vocabulary nor a look from the host.  Every operation is the same whatever the values are, so
the whole step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cvxq.sample import SamplingSettings

_SMALLEST = 1e-30  # no exponential variable is zero


class DeviceSampler:
    """Chooses tokens on a device; the same seed, device and logits give the same tokens."""

    def __init__(self, settings: SamplingSettings, vocabulary: int, device: torch.device) -> None:
        """Make the state for logits (vocabulary,) on `device`; `restart` begins a text."""
        self.settings = settings
        self.generator = torch.Generator(device)
        self._noise = torch.ones(vocabulary, device=device)
        self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._drawn = torch.zeros(vocabulary, device=device)  # how many times
        self._counts = settings.presence_penalty != 0 or settings.frequency_penalty != 0
        self._bias: torch.Tensor | None = None
        if settings.logit_bias:
            self._bias = torch.zeros(vocabulary, device=device)
            for token, bias in settings.logit_bias:
                self._bias[token] += bias

    def restart(self, seed: int | None, ids: Sequence[int]) -> None:
        """Begin after the text `ids`; seed None draws differently each time."""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self._drawn.zero_()
        self._seen.zero_()
        if self.settings.repetition_penalty != 1:
            self._seen[torch.tensor(sorted(set(ids)), device=self._seen.device)] = True

    def choose(self, logits: torch.Tensor, token: torch.Tensor) -> None:
        """Write the token chosen from logits (V,) float32 to `token` (1,) int64."""
        settings = self.settings
        if settings.repetition_penalty != 1:
            scaled = logits * settings.repetition_penalty
            divided = logits / settings.repetition_penalty
            logits = torch.where(self._seen, torch.where(logits > 0, divided, scaled), logits)
        if self._counts:
            logits = logits - self._drawn * settings.frequency_penalty
            logits = logits - (self._drawn > 0) * settings.presence_penalty
        if self._bias is not None:
            logits = logits + self._bias
        if settings.temperature > 0:
            logits = truncate(logits / settings.temperature, settings)
            self._noise.exponential_(generator=self.generator).clamp_(min=_SMALLEST)
            logits = logits.softmax(0) / self._noise
        token.copy_(logits.argmax(0, keepdim=True))
        if settings.repetition_penalty != 1:
            self._seen.index_fill_(0, token, True)
        if self._counts:
            self._drawn.index_add_(0, token, torch.ones_like(token, dtype=torch.float32))


def truncate(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Set to −inf the logits (V,) that top-k, then top-p, then min-p leave out."""
    if 0 < settings.top_k < len(logits):
        least = logits.topk(settings.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    if settings.top_p < 1:
        values, order = logits.sort(descending=True)
        # Sums on a GPU are not added in the same order every time; in float64 nobody notices.
        probabilities = values.softmax(0, dtype=torch.float64)
        before = probabilities.cumsum(0) - probabilities
        left_out = torch.empty_like(order, dtype=torch.bool)
        left_out.scatter_(0, order, before >= settings.top_p)
        logits = logits.masked_fill(left_out, -math.inf)
    if settings.min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(settings.min_p), -math.inf)
    return logits

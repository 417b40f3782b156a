"""What the original predicts on the calibration sequences, small enough to keep for all of them.

Of each next-token distribution the `KEPT` most likely tokens stay, and the probability of all the
others together. The KL divergence between two distributions lumped in this way is never above the
full one and as smooth in the second; with 256 tokens kept little is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEPT = 256
SMALLEST = 1e-7  # probability left to the other tokens: float32 sums are not better


@dataclass(frozen=True)
class Lesson:
    """One sequence: tokens (L,), the likeliest next tokens (L, T) and their log-probabilities.

    rest: (L,) log-probability of all tokens that are not among them.
    """

    ids: Tensor
    likeliest: Tensor
    log_probabilities: Tensor
    rest: Tensor

    def loss(self, logits: Tensor) -> Tensor:
        """Mean KL(original ‖ network) over the positions, of logits (L, V), differentiable."""
        ours = torch.log_softmax(logits.float(), dim=-1).gather(1, self.likeliest)
        others = torch.log((1 - ours.exp().sum(-1)).clamp_min(SMALLEST))
        known = (self.log_probabilities.exp() * (self.log_probabilities - ours)).sum(-1)
        return (known + self.rest.exp() * (self.rest - others)).mean()


@torch.no_grad()
def make_lessons(network: Any, sequences: Tensor) -> list[Lesson]:
    """Run the original over sequences (S, L)."""
    lessons = []
    for row in sequences:
        ids = row.to(network.device)
        logits = network(input_ids=ids[None], use_cache=False).logits[0]
        every = torch.log_softmax(logits.float(), dim=-1)
        kept, likeliest = every.topk(min(KEPT, every.shape[1]), dim=-1)
        rest = torch.log((1 - kept.exp().sum(-1)).clamp_min(SMALLEST))
        lessons.append(Lesson(ids, likeliest, kept, rest))
    return lessons

"""The output layer's share of measuring: logits and their gradients a few positions at a time.

Logits of a whole sequence rival a small model in size, and so does the gradient of the layer's
weights. So the layer is taken out of autograd: what comes to it is kept, the gradient of its output
is made for a few positions after the other, and that of its weights for a few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.seeds import draw_one
from cvxq_converter.source.blocks import Streamed

_PROBABILITIES = 1 << 18  # logits turned into float32 probabilities at once
_WEIGHTS = 1 << 22  # of whose gradient is there at once


@dataclass(frozen=True)
class HeadPass:
    """What went through the output layer for one sequence.

    inputs: (L, K); gradients: (L, V), of its outputs; targets: (L,) drawn for "kl", else None.
    input_gradient: (1, L, K).
    """

    inputs: Tensor
    gradients: Tensor
    targets: Tensor | None
    input_gradient: Tensor

    def weight_gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the layer's weight, and its gradient (rows, K) there."""
        V = self.gradients.shape[1]
        step = max(1, _WEIGHTS // self.inputs.shape[1])
        for start in range(0, V, step):
            rows = slice(start, min(start + step, V))
            part = self.gradients[:, rows].to(self.inputs.device)
            yield rows, part.T @ self.inputs


def head_pass(
    streamed: Streamed,
    s: int,
    ids: Tensor,
    last: Tensor | None,
    x: Tensor,
    draw: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    space: Tensor,
) -> HeadPass:
    """Back-propagate a random vector from the logits of sequence s to the output layer's input x.

    last: (1, L, h), what x was made of; None for a network in one piece. draw: logits → gradient
    and targets. space: (L, V) for the gradients of the layer's output.
    """
    felt = torch.zeros_like(x)
    targets = []
    for part in streamed.parts(len(ids)):
        with torch.no_grad():
            projected = streamed.project(x[:, part])
        logits = streamed.logits(s, ids, last, projected.requires_grad_())
        gradient, drawn = draw(logits)
        logits.backward(gradient)
        assert projected.grad is not None
        space[part] = projected.grad[0]
        with torch.no_grad():
            felt[:, part] = projected.grad @ streamed.head.weight
        if drawn is not None:
            targets.append(drawn)
    return HeadPass(x.detach()[0], space, torch.cat(targets) if targets else None, felt)


def output_gradient(
    logits: Tensor, metric: str, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Draw the random vector to back-propagate, like `logits`, and the targets of "kl".

    Works on a few tokens at a time: float32 copies of all logits would rival the model in size.
    """
    gradient = torch.empty_like(logits)
    if metric == "logits":
        return gradient.bernoulli_(0.5, generator=generator).mul_(2).sub_(1), None
    rows, out = logits.detach().flatten(0, -2), gradient.view(-1, logits.shape[-1])
    step = max(1, _PROBABILITIES // rows.shape[1])
    targets = []
    for start in range(0, len(rows), step):
        share = torch.softmax(rows[start : start + step], dim=-1, dtype=torch.float32)
        if not torch.isfinite(share[:, 0]).all():  # of a row all are finite, or none
            raise ConversionError("logits are not finite; use --dtype bfloat16 or float32")
        target = draw_one(share, generator)[:, None]
        sign = torch.empty_like(target, dtype=torch.float32)
        sign.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        share.neg_().scatter_add_(1, target, torch.ones_like(sign)).mul_(sign)
        out[start : start + step] = share.to(out.dtype)
        targets.append(target.flatten())
    return gradient, torch.cat(targets)

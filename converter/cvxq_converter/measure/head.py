"""The output layer's share of measuring: logits and their gradients a few positions at a time.

Logits of a whole sequence rival a small model in size, and so does the gradient of the layer's
weights. So the layer is taken out of autograd: what comes to it is kept, and the gradient of its
output is made for a few positions after the other.

What the loss feels of the layer itself needs no drawing. Of the output y_v, v being a token, the
expected square of the gradient is known: p_v (1 − p_v) for "kl", 1 for "logits", times the square
of what the network makes of y_v afterwards (a soft cap, a factor). A drawn target would say of a
token of probability p that it matters p² where it was not drawn, and 1 where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.seeds import draw_one
from cvxq_converter.source.blocks import Streamed

_PROBABILITIES = 1 << 18  # logits turned into float32 probabilities at once


@dataclass(frozen=True)
class Drawn:
    """What goes back from logits (…, V), and what would on average.

    gradient: like the logits, with random signs. root: like them, the root of the expected square
    of each. expected: (V,) float64, sum over the positions of the predicted probabilities.
    """

    gradient: Tensor
    root: Tensor
    expected: Tensor


@dataclass(frozen=True)
class HeadPass:
    """What went through the output layer for one sequence.

    inputs: (L, K); weights: (L,) expected squares of the gradients of its outputs, in all; rows:
    (V,) float64, Σ_t of them times |x_t|², the expected square of the gradient of the layer's rows.
    expected: (V,) float64, Σ_t of the next token's probabilities. input_gradient: (1, L, K).
    """

    inputs: Tensor
    weights: Tensor
    rows: Tensor
    expected: Tensor
    input_gradient: Tensor


def head_pass(
    streamed: Streamed,
    s: int,
    ids: Tensor,
    last: Tensor | None,
    x: Tensor,
    draw: Callable[[Tensor], Drawn],
) -> HeadPass:
    """Back-propagate a random vector from the logits of sequence s to the output layer's input x.

    last: (1, L, h), what x was made of; None for a network in one piece.
    """
    felt, inputs = torch.zeros_like(x), x.detach()[0]
    weights, V = torch.empty(len(ids), device=x.device), len(streamed.head.weight)
    rows, expected = (torch.zeros(V, dtype=torch.float64, device=x.device) for _ in range(2))
    for part in streamed.parts(len(ids)):
        with torch.no_grad():
            projected = streamed.project(x[:, part])
        logits = streamed.logits(s, ids, last, projected.requires_grad_())
        drawn = draw(logits)
        (root,) = torch.autograd.grad(logits, projected, drawn.root, retain_graph=True)
        (gradient,) = torch.autograd.grad(logits, projected, drawn.gradient)
        with torch.no_grad():
            felt[:, part] = gradient @ streamed.head.weight
            squares = root[0].float().square_()
            weights[part] = squares.sum(-1)
            rows += (inputs[part].float().square().sum(-1) @ squares).double()
            expected += drawn.expected
    return HeadPass(inputs, weights, rows, expected, felt)


def output_gradient(logits: Tensor, metric: str, generator: torch.Generator) -> Drawn:
    """Draw the random vector to back-propagate.

    Works on a few tokens at a time: float32 copies of all logits would rival the model in size.
    """
    gradient, root = torch.empty_like(logits), torch.ones_like(logits)
    expected = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
    if metric == "logits":
        gradient.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    rows, V = logits.detach().flatten(0, -2), logits.shape[-1]
    step = max(1, _PROBABILITIES // V)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        share = torch.softmax(rows[part], dim=-1, dtype=torch.float32)
        expected += share.sum(0, dtype=torch.float64)
        if metric == "logits":
            continue
        if not torch.isfinite(share[:, 0]).all():  # of a row all are finite, or none
            raise ConversionError("logits are not finite; use --dtype bfloat16 or float32")
        root.view(-1, V)[part] = (share * (1 - share)).sqrt_().to(root.dtype)
        target = draw_one(share, generator)[:, None]
        sign = torch.empty_like(target, dtype=torch.float32)
        sign.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        share.neg_().scatter_add_(1, target, torch.ones_like(sign)).mul_(sign)
        gradient.view(-1, V)[part] = share.to(gradient.dtype)
    return Drawn(gradient, root, expected)

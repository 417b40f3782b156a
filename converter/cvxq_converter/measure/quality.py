"""KL divergence to the original on a few sequences, while both are at hand.

The original's log-probabilities are computed once, before the network's weights are replaced, and
lie in a scratch file; those of the other network are there for a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cvxq_converter.source.exactness import as_streamed

HELD_BACK = 8  # one sequence in eight is kept from the measurement
LOGIT_LIMIT = 1 << 28  # entries kept in float32: 1 GiB on disk


@dataclass(frozen=True)
class Divergence:
    """KL(original ‖ quantized) per token, nats; standard error over tokens.

    loss_increase: mean of log p − log q on the tokens that came, nats.
    by_position: (S, L) float64 KL at every position of every sequence.
    """

    mean: float
    standard_error: float
    tokens: int
    loss_increase: float
    by_position: np.ndarray = field(compare=False, repr=False)


@dataclass(frozen=True)
class Reference:
    """Next-token log-probabilities of the original on held-back sequences.

    sequences: (S, L) int64; log_probabilities: per sequence (L, V) float32, on the CPU.
    """

    sequences: torch.Tensor
    log_probabilities: Sequence[torch.Tensor]


@torch.no_grad()
def make_reference(network: Any, sequences: torch.Tensor) -> Reference:
    """Run the original over sequences (S, L)."""
    streamed = as_streamed(network)
    kept: list[torch.Tensor] = []
    for s, part, logits in streamed.all_logits(sequences):
        if s == len(kept):
            shape = (sequences.shape[1], logits.shape[1])
            kept.append(streamed.scratch.zeros(shape, torch.float32))
        kept[s][part] = torch.log_softmax(logits.float(), dim=-1).cpu()
    return Reference(sequences, kept)


def split_sequences(sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences to measure on, and those held back; a single one serves for both."""
    if len(sequences) < 2:
        return sequences, sequences
    held = max(1, len(sequences) // HELD_BACK)
    return sequences[:-held], sequences[-held:]


def choosing_and_certifying(
    held_back: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of those held back (S, L), the sequences for choices and those for figures.

    One serves for both. Of each at least one, and no more than keep half of `LOGIT_LIMIT`.
    """
    half = len(held_back) // 2
    if not half:
        return held_back, held_back
    most = max(1, LOGIT_LIMIT // 2 // (held_back.shape[1] * vocabulary))
    return held_back[:half][:most], held_back[half:][:most]


def make_references(network: Any, held_back: torch.Tensor) -> tuple[Reference, Reference]:
    """The original on the sequences for choices and on those for figures."""
    streamed = as_streamed(network)
    vocabulary = streamed.network.config.get_text_config().vocab_size
    choosing, certifying = choosing_and_certifying(held_back, vocabulary)
    reference = make_reference(streamed, choosing)
    if certifying is choosing:
        return reference, reference
    return reference, make_reference(streamed, certifying)


@torch.no_grad()
def divergence(network: Any, reference: Reference) -> Divergence:
    """KL of the network, whole or by blocks, to the reference."""
    S, L = reference.sequences.shape
    losses, increases = np.empty((S, L)), np.empty((S, L - 1))
    for s, part, logits in as_streamed(network).all_logits(reference.sequences):
        ours = torch.log_softmax(logits.float(), dim=-1)
        original = reference.log_probabilities[s][part].to(ours.device)
        losses[s, part] = (original.exp() * (original - ours)).sum(-1).double().cpu().numpy()
        came = reference.sequences[s][part.start + 1 : part.stop + 1, None].to(ours.device)
        known = slice(len(came))  # the last one has no successor
        change = original[known].gather(1, came) - ours[known].gather(1, came)
        increases[s, part.start : part.start + len(came)] = change[:, 0].double().cpu().numpy()
    values = losses.ravel()
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return Divergence(
        mean=float(values.mean()),
        standard_error=error,
        tokens=len(values),
        loss_increase=float(np.mean(increases)),
        by_position=losses,
    )

"""KL divergence to the original on a few sequences, while both are at hand.

The original's log-probabilities are computed once, before the network's weights are replaced.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

HELD_BACK = 8  # one sequence in eight is kept from the measurement
LOGIT_LIMIT = 1 << 26  # entries kept in float32: 256 MiB


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

    sequences: (S, L) int64; log_probabilities: per sequence (L, V) float32.
    """

    sequences: torch.Tensor
    log_probabilities: list[torch.Tensor]


@torch.no_grad()
def make_reference(network: Any, sequences: torch.Tensor, limit: int = LOGIT_LIMIT) -> Reference:
    """Run the original over as many of the sequences (S, L) as keep `limit` entries, or one."""
    kept: list[torch.Tensor] = []
    vocabulary = network.config.get_text_config().vocab_size
    for row in sequences:
        if kept and (len(kept) + 1) * row.numel() * vocabulary > limit:
            break
        kept.append(_log_probabilities(network, row))
    return Reference(sequences[: len(kept)], kept)


def split_sequences(sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences to measure on, and those held back; a single one serves for both."""
    if len(sequences) < 2:
        return sequences, sequences
    held = max(1, len(sequences) // HELD_BACK)
    return sequences[:-held], sequences[-held:]


def make_references(network: Any, held_back: torch.Tensor) -> tuple[Reference, Reference]:
    """The original on the sequences for choices and on those for figures; one serves for both."""
    half = len(held_back) // 2
    if not half:
        both = make_reference(network, held_back)
        return both, both
    parts = (held_back[:half], held_back[half:])
    choosing, certifying = (make_reference(network, p, LOGIT_LIMIT // 2) for p in parts)
    return choosing, certifying


@torch.no_grad()
def divergence(network: Any, reference: Reference) -> Divergence:
    """KL of the network, as it is now, to the reference."""
    losses, increases = [], []
    for row, original in zip(reference.sequences, reference.log_probabilities, strict=True):
        ours = _log_probabilities(network, row)
        losses.append((original.exp() * (original - ours)).sum(-1).double().cpu().numpy())
        came = row[1:, None].to(ours.device)
        change = original[:-1].gather(1, came) - ours[:-1].gather(1, came)
        increases.append(change.double().cpu().numpy())
    values = np.concatenate(losses)
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return Divergence(
        mean=float(values.mean()),
        standard_error=error,
        tokens=len(values),
        loss_increase=float(np.mean(increases)),
        by_position=np.stack(losses),
    )


def _log_probabilities(network: Any, row: torch.Tensor) -> torch.Tensor:
    logits = network(row[None].to(network.device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)

"""Random numbers that depend on a seed and on what they are for, never on what was drawn before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generator_of(seed: int, sequence: int, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator that one calibration sequence draws from."""
    mixed = int(np.random.SeedSequence((seed, sequence)).generate_state(1)[0])
    return torch.Generator(device=device).manual_seed(mixed)


def draw_one(shares: Tensor, generator: torch.Generator) -> Tensor:
    """Return one index of each row of shares (M, V), drawn as often as its share says; (M,) int64.

    `torch.multinomial` draws a number for every entry: on a CPU, where that goes one after the
    other, tokens would take longer to draw than to compute. Here it is one number for each row.
    """
    if shares.device.type != "cpu":
        return torch.multinomial(shares, 1, generator=generator)[:, 0]
    return _chosen(shares, torch.rand(len(shares), 1, generator=generator))


def draw_each(shares: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """The same on a CPU, where each row has a generator of its own."""
    return _chosen(shares, torch.stack([torch.rand(1, generator=own) for own in generators]))


def _chosen(shares: Tensor, places: Tensor) -> Tensor:
    """The indices (M,) where rows of shares (M, V) have reached `places` (M, 1) of their sums."""
    sums = shares.cumsum(-1)
    total = sums[:, -1:]
    place = torch.minimum(places * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, place, right=True)[:, 0]

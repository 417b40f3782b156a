"""Random numbers that depend on a seed and on what they are for, never on what was drawn before."""

from __future__ import annotations

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
    sums = shares.cumsum(-1)
    total = sums[:, -1:]
    place = torch.rand(total.shape, generator=generator) * total
    place = torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, place, right=True)[:, 0]

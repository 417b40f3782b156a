"""Random numbers that depend on a seed and on what they are for, never on what was drawn before."""

from __future__ import annotations

import numpy as np
import torch


def generator_of(seed: int, sequence: int, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator that one calibration sequence draws from."""
    mixed = int(np.random.SeedSequence((seed, sequence)).generate_state(1)[0])
    return torch.Generator(device=device).manual_seed(mixed)

"""The weights of a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the last axis; weight and bias (n,) float32 or None."""

    kind: Literal["rms", "layer"]
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


HeadNorms: TypeAlias = "tuple[Norm | None, Norm | None]"  # of queries and of keys

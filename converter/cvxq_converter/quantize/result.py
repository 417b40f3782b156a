"""What quantizing a model leaves: its matrices, and what was decided on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from cvxq_format import Codebook, CompandedTensor

from cvxq_converter.allocate.allocation import BitAllocation
from cvxq_converter.measure.quality import Divergence


@dataclass(frozen=True)
class Quantized:
    """The quantized matrices by name, and the biases that layers gained, by tensor name.

    allocation, gain_exponent: None for round to nearest. quality: None without calibration.
    """

    tensors: dict[str, CompandedTensor]
    codebook: Codebook
    added_biases: dict[str, torch.Tensor] = field(default_factory=dict)
    allocation: BitAllocation | None = None
    gain_exponent: float | None = None
    quality: Divergence | None = None

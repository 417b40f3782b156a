"""Stacks of matrices in MXFP4 (gpt-oss): 4-bit floats in blocks of 32 that share a power of two.

NAME_blocks, (E, N, K / 32, 16) uint8, holds two values a byte, the low half first; NAME_scales,
(E, N, K / 32) uint8, holds exponents, 127 for 1. Networks hold NAME, (E, K, N).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cvxq_converter.source.folder import TensorInfo

BLOCKS, SCALES = "_blocks", "_scales"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1; the fourth bit is the sign
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])


@dataclass(frozen=True)
class Mxfp4:
    """The files that hold the blocks and the scales of one stack."""

    blocks: Path
    scales: Path


def take_mxfp4(tensors: dict[str, TensorInfo]) -> dict[str, Mxfp4]:
    """Put NAME in place of every NAME_blocks and NAME_scales that fit; return where they lie."""
    found = {}
    for key in [key for key in tensors if key.endswith(BLOCKS)]:
        name = key.removesuffix(BLOCKS)
        blocks, scales = tensors[key], tensors.get(name + SCALES)
        if scales is None or blocks.shape != (*scales.shape, 16) or len(scales.shape) != 3:
            continue
        if blocks.dtype is torch.uint8 and scales.dtype is torch.uint8:
            found[name] = Mxfp4(blocks.file, scales.file)
            experts, rows, count = scales.shape
            del tensors[key], tensors[name + SCALES]
            tensors[name] = TensorInfo(blocks.file, (experts, count * 32, rows), torch.bfloat16)
    return found


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the stack (E, K, N) in bfloat16, which holds every value exactly."""
    made = torch.empty(*blocks.shape[:3], 32, dtype=torch.bfloat16)
    for expert, packed in enumerate(blocks):
        pairs = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)  # (N, K / 32, 32)
        exponents = scales[expert, ..., None].int() - 127
        made[expert] = torch.ldexp(_VALUES[pairs.int()], exponents)
    return made.flatten(2).transpose(1, 2)

"""Checkpoints that are quantized already: float8 weights beside their scales, or a refusal.

Float8 weights become floats by one product: with one scale per tensor, per row, or per block of
rows and columns. Integers need the code of whatever library wrote them, which is not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvxq_converter.errors import ConversionError
from cvxq_converter.source.folder import TensorInfo

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_NOT_PACKED = (*_FLOATS, torch.bool, torch.int64)  # masks and positions are stored in the last two
_SUFFIXES = ("_scale_inv", "_scale")  # of the name of a float8 weight; both are multiplied


@dataclass(frozen=True)
class Scale:
    """The scales of one float8 weight: the tensor that holds them, and the file of that.

    block: rows and columns that share one, None for one per tensor, row or column.
    """

    name: str
    file: Path
    block: tuple[int, int] | None


def find_scales(
    tensors: Mapping[str, TensorInfo], quantization: Any, name: str
) -> dict[str, Scale]:
    """Return the scales of every float8 weight; empty where all weights are wider floats.

    quantization: quantization_config of config.json, None without. Raises ConversionError if some
    weights are integers, or float8 without scales that fit.
    """
    block = _block(quantization)
    scales: dict[str, Scale] = {}
    for key, info in tensors.items():
        if info.dtype in _NOT_PACKED or len(info.shape) not in (2, 3):
            continue
        found = next((key + end for end in _SUFFIXES if key + end in tensors), None)
        stored = str(info.dtype).removeprefix("torch.")
        if info.dtype not in _FLOAT8:
            reason = f"{stored} needs the code of {_method(quantization) or 'what wrote it'}"
        elif found is None:
            reason = f"{stored} without {key}_scale or {key}_scale_inv cannot be scaled back"
        elif not _fits(tensors[found].shape, info.shape, block):
            shape, size = (" × ".join(map(str, t.shape)) for t in (info, tensors[found]))
            reason = f"the {size} scales of {found} do not fit {shape} weights"
        else:
            scales[key] = Scale(found, tensors[found].file, block)
            continue
        raise ConversionError(
            f"{name}: {key} is already quantized: {reason}; "
            "convert the original 16- or 32-bit checkpoint"
        )
    return scales


def quantization_notice(
    quantization: Any, scales: Mapping[str, Scale], stacks: int = 0
) -> str | None:
    """Say what was made of a checkpoint that is, or says that it is, quantized.

    stacks: of matrices, that are MXFP4.
    """
    counts = ((len(scales), "matrices are float8"), (stacks, "stacks of experts are MXFP4"))
    packed = [f"{count} of its {what}" for count, what in counts if count]
    if packed:
        return (
            f"the source was quantized already: {' and '.join(packed)}; "
            "their values are taken as they are"
        )
    if quantization is not None:
        return (
            f"config.json has a quantization_config ({_method(quantization)}), but the weights "
            "are floats; they are taken as they are"
        )
    return None


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Return float8 weights (N, K) times their scales, in float32.

    scale: one, (N,), (N, 1), (1, K), or one for each block of `block` rows and columns.
    """
    scale = scale.float()
    if scale.ndim == 1 and scale.numel() > 1:
        scale = scale[:, None]
    if scale.ndim == 2 and block is not None:
        for axis, (size, length) in enumerate(zip(block, weight.shape, strict=True)):
            if scale.shape[axis] not in (1, length):
                scale = scale.repeat_interleave(size, axis).narrow(axis, 0, length)
    return weight.float() * scale


def _fits(scale: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    if len(weight) != 2:
        return False
    if all(size == 1 for size in scale) or scale == weight[:1]:
        return True
    if len(scale) != 2:
        return False
    sizes = block or weight  # without blocks: one for all, or one for each
    return all(
        found in (1, length, -(-length // size))
        for found, length, size in zip(scale, weight, sizes, strict=True)
    )


def _block(quantization: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where config.json says so in either of its ways."""
    if not isinstance(quantization, dict):
        return None
    groups = quantization.get("config_groups")
    described: Any = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
    weights = described.get("weights") if isinstance(described, dict) else None
    found = quantization.get("weight_block_size")
    if found is None and isinstance(weights, dict):
        found = weights.get("block_structure")
    if not isinstance(found, list | tuple) or len(found) != 2:
        return None
    rows, columns = found
    if not all(isinstance(size, int) and size > 0 for size in (rows, columns)):
        return None
    return rows, columns


def _method(quantization: Any) -> str | None:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method") or "of no method")
    return None if quantization is None else str(quantization)

"""Random packed weights made on the device, and copies of them that do not fit its cache."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from cvxq_format import Codebook
from cvxq_kernels import PackedWeight
from cvxq_kernels.gpu import GpuWeight
from cvxq_kernels.tables import joined_levels

GROUP_SIZE = 64  # what `cvxq convert` uses
SIGMA = 0.7  # standard deviation of log2 of a row's scale, and of a column's: `random_model.py`


def mixed_depths(clusters: int, columns: int, mean: float, seed: int) -> torch.Tensor:
    """Separable depths (clusters, columns) uint8 with the given mean."""
    generator = torch.Generator().manual_seed(seed)
    worth = SIGMA * torch.randn(clusters, 1, generator=generator)
    worth = worth + SIGMA * torch.randn(1, columns, generator=generator)
    low, high = -10.0, 20.0
    for _ in range(40):  # the mean grows with the shift: halve until it is met
        shift = (low + high) / 2
        depths = (worth + shift).round().clamp(0, 8)
        low, high = (shift, high) if depths.mean() < mean else (low, shift)
    return depths.to(torch.uint8)


def histogram(depths: torch.Tensor) -> str:
    """Shares of the depths, as in "0: 1 %, 1: 4 %"."""
    share = torch.bincount(depths.reshape(-1).int(), minlength=9) / depths.numel()
    return ", ".join(f"{depth}: {100 * s:.0f} %" for depth, s in enumerate(share) if s >= 0.005)


def random_packed(
    outputs: int, inputs: int, depths: torch.Tensor, device: torch.device, seed: int = 0
) -> PackedWeight:
    """Random codes in the file's packing; outputs a multiple of GROUP_SIZE, so no spare bits."""
    clusters = outputs // GROUP_SIZE
    sizes = depths.long() * (GROUP_SIZE // 8)
    offsets = sizes.sum(1).cumsum(0) - sizes.sum(1)
    generator = torch.Generator(device=device).manual_seed(seed)
    total = int(sizes.sum())
    codes = torch.randint(256, (total,), dtype=torch.uint8, device=device, generator=generator)
    scale_codes = torch.randint(
        40, 64, (1, clusters, inputs), dtype=torch.uint8, device=device, generator=generator
    )
    order = torch.randperm(outputs, generator=torch.Generator().manual_seed(seed))[None]
    codebook = Codebook.default()
    first = torch.arange(clusters) * GROUP_SIZE
    return PackedWeight(
        shape=(outputs, inputs),
        group_size=GROUP_SIZE,
        transposed=False,
        codes=codes,
        depths=depths[None].to(device),
        scale_codes=scale_codes,
        mean_codes=None,
        row_of_position=order.to(device),
        position_of_row=order.argsort(1).to(device),
        cluster_first_row=first.to(device),
        cluster_rows=torch.full((clusters,), GROUP_SIZE, device=device),
        cluster_offset=offsets[None].to(device),
        row_factors=None,
        scales=torch.from_numpy(codebook.scale_table.astype(np.float32) / 16).to(device),
        means=torch.zeros(256, device=device),
        levels=torch.from_numpy(joined_levels(codebook)).to(device),
    )


def copies(weight: GpuWeight, least_bytes: int) -> list[GpuWeight]:
    """`weight` and copies of all it holds, together at least `least_bytes`, with the same plans."""
    result = [weight]
    while len(result) * weight.nbytes < least_bytes:
        matrix = weight.matrix
        moved: dict[str, Any] = {
            field.name: value.clone()
            for field in fields(matrix)
            if isinstance(value := getattr(matrix, field.name), torch.Tensor)
        }
        copy = GpuWeight(replace(matrix, **moved))
        copy.plans = weight.plans
        result.append(copy)
    return result

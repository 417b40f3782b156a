"""Take a peer's quantized matrix apart into what a file must store, and put it together again.

A matrix (N, K) whose input columns are dealt to groups is, per weight, an integer code of `bits`
bits and, per row and group, a float16 scale and (asymmetric grids) a zero point, an integer of
`bits` bits or a float16:

    weight = (code − zero) · scale

Published rates of GPTQ count exactly this: 3 bits in groups of 64 are 3 + (16 + 3)/64 = 3.30.
Groups that are not runs of neighbouring columns are charged an index per column, too.
"""

import math
from dataclasses import dataclass

import torch

SCALE_BITS = 16


@dataclass(frozen=True)
class Parts:
    """Bits that codes, scales, zero points and column indices of a matrix take, tightly packed."""

    codes: int = 0
    scales: int = 0
    zero_points: int = 0
    indices: int = 0

    @property
    def total(self) -> int:
        """All bits."""
        return self.codes + self.scales + self.zero_points + self.indices

    def __add__(self, other: "Parts") -> "Parts":
        """Bits of two matrices together."""
        return Parts(
            self.codes + other.codes,
            self.scales + other.scales,
            self.zero_points + other.zero_points,
            self.indices + other.indices,
        )


def group_size(inputs: int, wanted: int) -> int:
    """The divisor of `inputs` nearest to the group size wanted, by ratio; the smaller of two."""
    divisors = [size for size in range(1, inputs + 1) if inputs % size == 0]
    return min(divisors, key=lambda size: abs(math.log(size / wanted)))


def take_apart(
    name: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    groups: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Parts]:
    """Return the weights that codes, scales and zero points give back, and the bits of each.

    weight: (N, K), as the peer left it; scale: (N, groups), values that float16 holds exactly;
    zero: (N, groups) integers in −2^(bits−1) … 2^(bits−1) − 1, or None for a symmetric grid;
    groups: (K,) group of each column, by default runs of equal length.
    Raises ValueError when the weights are not on that grid, so that nothing the peer computes
    with but could not store is credited to it.
    """
    outputs, inputs = weight.shape
    count = scale.shape[1]
    if scale.shape[0] != outputs or (groups is None and inputs % count):
        raise ValueError(f"{name}: {tuple(scale.shape)} scales for weights {tuple(weight.shape)}")
    if (scale.half().float() != scale.float()).any():
        raise ValueError(f"{name}: some scales need more than the {SCALE_BITS} bits of a float16")
    runs = torch.arange(count).repeat_interleave(-(-inputs // count))[:inputs]
    index = runs if groups is None else groups.long()
    step = scale.float()[:, index]
    offset = torch.zeros(()) if zero is None else zero.float()[:, index]
    weight = weight.float()
    codes = torch.where(step == 0, offset, torch.round(weight / step + offset))
    rebuilt = ((codes - offset) * step).contiguous()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for what, values in (("codes", codes), ("zero points", offset)):
        if values.min() < low or values.max() > high or (values != values.round()).any():
            raise ValueError(f"{name}: {what} do not fit {bits} bits")
    if not torch.allclose(rebuilt, weight, rtol=1e-3, atol=1e-6 * float(weight.abs().max())):
        worst = float((rebuilt - weight).abs().max())
        raise ValueError(f"{name}: weights are off the peer's grid, by up to {worst:.2g}")
    in_runs = bool((index[1:] >= index[:-1]).all())
    return rebuilt, Parts(
        codes=weight.numel() * bits,
        scales=scale.numel() * SCALE_BITS,
        zero_points=0 if zero is None else scale.numel() * bits,
        indices=0 if in_runs else inputs * math.ceil(math.log2(count)),
    )

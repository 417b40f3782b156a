"""Take a peer's quantized matrix apart into what a file must store, and put it together again.

A matrix (N, K) in groups of G consecutive inputs is, per weight, an integer code of `bits` bits
and, per group, a float16 scale and (asymmetric grids) an integer zero point of `bits` bits:

    weight = (code − zero) · scale

Published rates of GPTQ count exactly this: 3 bits in groups of 64 are 3 + (16 + 3)/64 = 3.30.
"""

from dataclasses import dataclass

import torch

SCALE_BITS = 16


@dataclass(frozen=True)
class Parts:
    """Bits that the codes, the scales and the zero points of a matrix take, tightly packed."""

    codes: int = 0
    scales: int = 0
    zero_points: int = 0

    @property
    def total(self) -> int:
        """All bits."""
        return self.codes + self.scales + self.zero_points

    def __add__(self, other: "Parts") -> "Parts":
        """Bits of two matrices together."""
        return Parts(
            self.codes + other.codes,
            self.scales + other.scales,
            self.zero_points + other.zero_points,
        )


def take_apart(
    name: str, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, Parts]:
    """Return the weights that codes, scales and zero points give back, and the bits of each.

    weight: (N, K), as the peer left it; scale: (N, K/G), values that float16 holds exactly;
    zero: (N, K/G) integers in −2^(bits−1) … 2^(bits−1) − 1, or None for a symmetric grid.
    Raises ValueError when the weights are not on that grid, so that nothing the peer computes
    with but could not store is credited to it.
    """
    outputs, inputs = weight.shape
    if scale.shape[0] != outputs or inputs % scale.shape[1]:
        raise ValueError(f"{name}: {tuple(scale.shape)} scales for weights {tuple(weight.shape)}")
    if (scale.half().float() != scale.float()).any():
        raise ValueError(f"{name}: some scales need more than the {SCALE_BITS} bits of a float16")
    group = inputs // scale.shape[1]
    step = scale.float().repeat_interleave(group, 1)
    offset = torch.zeros(()) if zero is None else zero.float().repeat_interleave(group, 1)
    weight = weight.float()
    codes = torch.round(weight / step + offset)
    rebuilt = ((codes - offset) * step).contiguous()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for what, values in (("codes", codes), ("zero points", offset)):
        if values.min() < low or values.max() > high or (values != values.round()).any():
            raise ValueError(f"{name}: {what} do not fit {bits} bits")
    if not torch.allclose(rebuilt, weight, rtol=1e-3, atol=1e-6 * float(weight.abs().max())):
        worst = float((rebuilt - weight).abs().max())
        raise ValueError(f"{name}: weights are off the peer's grid, by up to {worst:.2g}")
    zero_bits = 0 if zero is None else scale.numel() * bits
    return rebuilt, Parts(weight.numel() * bits, scale.numel() * SCALE_BITS, zero_bits)

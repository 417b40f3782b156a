"""Trellis codes for the rows of a cluster, with or without error feedback.

The weights of a row are coded one after the other, in the order of the stored columns. The bits
coded last are the **window**, and the window says which levels a weight may take; so the levels of
many weights are chosen together, by the Viterbi algorithm. Two codes:

- `Ungerboeck`: trellis-coded quantization (Marcellin and Fischer, 1990). Of a table of 2^(R+1)
  levels, level i belongs to subset i mod 4. One bit of each code goes through a shift register
  whose two parities name the subset, the other R − 1 bits choose in it.
- `Computed`: the bitshift trellis and "1MAD" levels of QTIP (arXiv 2406.11235). All R bits enter
  the window; the level is the sum of the four bytes of a linear congruence of it. No table.

The window starts as 0 in every row, so a code of depth R costs R bits and nothing else. It passes
unchanged through columns whose depth is not in `DENSE`; those keep their scalar levels. With error
feedback, each of the surviving paths feeds back its own errors; a decision is final `DELAY`
columns later, when its error is pushed onto all columns still to come (`quantize` has the theory).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from cvxq_converter.quantize.companding import LevelHistogram, fit_levels
from torch import Tensor

DENSE = (2, 3, 4)
DELAY = 64
CHECKS = {2: (0o2, 0o5), 3: (0o4, 0o13), 4: (0o4, 0o23), 6: (0o24, 0o103), 8: (0o362, 0o515)}
MULTIPLIER, INCREMENT = 34038481, 76625530  # of 1MAD


class Code(Protocol):
    """A trellis code: `window` bits, of which `entering(R)` are new with each code of depth R."""

    window: int

    def entering(self, depth: int) -> int:
        """Bits of a code that enter the window."""

    def levels(self, depth: int) -> Tensor:
        """(2^window, n) float32 levels that each window allows."""

    def fit(self, depth: int, samples: Tensor) -> None:
        """Fit the levels of one depth to samples (rows, columns) at unit scale."""


class Ungerboeck:
    """A table of 2^(R+1) levels in four subsets, a convolutional code of 2^memory states."""

    def __init__(self, memory: int) -> None:
        self.window = memory + 1
        windows = range(1 << self.window)
        low, high = ([(w & check).bit_count() & 1 for w in windows] for check in CHECKS[memory])
        self.subset = 2 * torch.tensor(high) + torch.tensor(low)
        self.tables: dict[int, Tensor] = {}

    def entering(self, depth: int) -> int:
        return 1

    def levels(self, depth: int) -> Tensor:
        return self.tables[depth].view(-1, 4).T[self.subset]

    def fit(self, depth: int, samples: Tensor) -> None:
        """Lloyd's iteration: the mean of what was coded as a level, or as its mirror image."""
        self.tables[depth] = torch.from_numpy(fit_levels(histogram(samples), depth + 1))
        for _ in range(10):
            table = self.tables[depth]
            coded = encode_plain(samples, depth, self)
            place = torch.bucketize(coded, (table[1:] + table[:-1]) / 2).flatten()
            count = torch.bincount(place, minlength=len(table))
            total = torch.bincount(place, samples.flatten(), minlength=len(table))
            count, total = count + count.flip(0), total - total.flip(0)
            self.tables[depth] = torch.where(count > 0, total / count.clamp_min(1), table)


class Computed:
    """Levels computed from a window of `window` bits, and an amplitude per depth."""

    def __init__(self, window: int) -> None:
        self.window = window
        hashed = (torch.arange(1 << window) * MULTIPLIER + INCREMENT) & 0xFFFFFFFF
        total = torch.stack([(hashed >> shift) & 255 for shift in (0, 8, 16, 24)]).sum(0)
        value = total - 510.0
        self.values = (value / value.std())[:, None]
        self.amplitudes: dict[int, float] = {}

    def entering(self, depth: int) -> int:
        return depth

    def levels(self, depth: int) -> Tensor:
        return self.values * self.amplitudes[depth]

    def fit(self, depth: int, samples: Tensor) -> None:
        """Least squares, alternating with the choice of paths."""
        self.amplitudes[depth] = float(samples.std())
        for _ in range(4):
            coded = encode_plain(samples, depth, self)
            self.amplitudes[depth] *= float((samples * coded).sum() / coded.square().sum())


def histogram(samples: Tensor) -> LevelHistogram:
    """Absolute values of samples (rows, columns), all alike."""
    counted = LevelHistogram.empty()
    counted.add(samples, torch.ones(len(samples)))
    return counted


def encode_plain(samples: Tensor, depth: int, code: Code) -> Tensor:
    """Code samples (N, K) of unit scale, one row like the other, without feedback."""
    depths = np.full((1, samples.shape[1]), depth)
    ones, zeros = torch.ones(1, 1), torch.zeros(1, 1)
    return encode(samples[None], depths, lambda *_: (ones, zeros), [], code).quantized[0]


@dataclass(frozen=True)
class Encoded:
    """Weights (C, G, K) moved by feedback, and what codes make of them, less the shifts (C, K)."""

    moved: Tensor
    quantized: Tensor
    shift: Tensor


def encode(
    weights: Tensor,
    depths: np.ndarray,
    fit_group: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    tables: list[Tensor],
    code: Code | None,
    factor: Tensor | None = None,
) -> Encoded:
    """Choose the levels of a matrix, column by column.

    weights: (C, G, K) float32, of C clusters; depths: (C, K). fit_group: called with a column and
    its weights (C, G), returns their scales and shifts, each (C, 1). tables: scalar levels by
    depth, for depths outside `DENSE`, or for all without a code. factor: U of `InverseFactor` for
    columns in this order, None for no feedback.
    """
    C, G, K = weights.shape
    weights, clusters, rows = weights.clone(), torch.arange(C)[:, None], torch.arange(G)
    cost = torch.zeros(C, G, 1 << code.window if code else 1)
    cost[..., 1:] = torch.inf
    errors = torch.empty(*cost.shape, 0)  # of each path in the columns not yet decided
    moved, quantized = torch.empty_like(weights), torch.empty_like(weights)
    shifts = torch.empty(C, K)
    pivot = torch.ones(K) if factor is None else factor.diagonal()
    low = 0

    def decide() -> None:
        nonlocal errors
        error = errors[clusters, rows, cost.argmin(2), 0]
        cost.masked_fill_(errors[..., 0] != error[..., None], torch.inf)
        errors = errors[..., 1:]
        moved[..., low] = weights[..., low] - shifts[:, low, None]
        quantized[..., low] = moved[..., low] - error * pivot[low]
        if factor is not None:
            weights[..., low + 1 :] -= error[..., None] * factor[low, low + 1 :]

    for j in range(K):
        target = weights[..., j, None].expand(C, G, 1)
        if factor is not None:
            target = target - errors @ factor[low:j, j]
        likely = target.expand(cost.shape)[clusters, rows, cost.argmin(2)]
        scale, shift = fit_group(j, likely)
        shifts[:, j] = shift[:, 0]
        target = target - shift[..., None]
        power = (scale / pivot[j]).square()[..., None]
        unit = target / scale.clamp_min(1e-30)[..., None]
        latest = torch.empty(cost.shape)
        for depth in np.unique(depths[:, j]).tolist():
            c = torch.from_numpy(depths[:, j] == depth).nonzero()[:, 0]
            if code is None or depth not in DENSE:
                latest[c] = unit[c] - nearest(unit[c], tables[depth])
                cost[c] += latest[c].square() * power[c]
                continue
            flat = unit[c].flatten(0, 1)
            powers = power[c].expand(-1, G, 1).reshape(-1, 1)
            found, origin, left = step(cost[c].flatten(0, 1), flat, powers, depth, code)
            cost[c], latest[c] = found.view(-1, *cost.shape[1:]), left.view(-1, *cost.shape[1:])
            origin = origin.view(-1, *cost.shape[1:], 1).expand(-1, -1, -1, errors.shape[3])
            errors[c] = errors[c].gather(2, origin)
        latest *= (scale / pivot[j])[..., None]
        errors = torch.cat([errors, latest[..., None]], 3)
        if errors.shape[3] > DELAY:
            decide()
            low += 1
    while errors.shape[3]:
        decide()
        low += 1
    return Encoded(moved, quantized, shifts)


def step(
    cost: Tensor, unit: Tensor, power: Tensor, depth: int, code: Code
) -> tuple[Tensor, Tensor, Tensor]:
    """One code of all paths: by new window (N, S) their cost, old window, and error at unit scale.

    cost: (N, S); unit: (N, S) or (N, 1), to be coded, at unit scale; power: (N, 1), of the scale.
    """
    entering = code.entering(depth)
    windows = torch.arange(1 << code.window)
    oldest = torch.arange(1 << entering) << (code.window - entering)
    origins = (windows >> entering)[:, None] | oldest  # (S, 2^entering)
    levels = code.levels(depth)
    choices = unit[..., None] if unit.shape[1] == 1 else unit[:, origins]
    errors = choices[..., None] - levels[:, None]  # (N, S, 2^entering or 1, n)
    nearest = errors.abs().argmin(-1, keepdim=True)
    errors = errors.gather(-1, nearest)[..., 0]
    total, which = (cost[:, origins] + errors.square() * power[..., None]).min(-1, keepdim=True)
    origin = origins.expand(len(cost), -1, -1).gather(2, which)[..., 0]
    errors = errors.expand(-1, -1, origins.shape[1]).gather(2, which)
    return total[..., 0], origin, errors[..., 0]


def nearest(unit: Tensor, table: Tensor) -> Tensor:
    """The nearest level of an ascending table."""
    return table[torch.bucketize(unit.contiguous(), (table[1:] + table[:-1]) / 2)]

"""One matrix while it is tuned: its scale codes and its weights' codes, and what the loss feels.

A scale is a position on the codebook's ladder, in octaves, that moves by any amount; the network
computes with the scale code nearest to it. A weight's code is a level of its group's table, and
moves by whole levels: those that promise most are moved at once, a few of each step (Malinovskii et
al., "PV-Tuning", 2024). Small steps of all codes never leave their levels, and those that do leave
them all together undo what the feedback of errors had won.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from cvxq_format import Codebook, CompandedTensor, pack_codes, unpack_codes
from cvxq_format.codebook import DEPTHS, first_levels
from torch import Tensor

from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.source.matrices import Matrix

SMALLEST_GAIN = 1e-12  # nats
_CHUNK = 1 << 20  # weights looked at together


@dataclass(frozen=True)
class Moves:
    """Codes of one matrix that may move by one level, at most as many as were asked for.

    gains: (m,) nats that each alone is expected to win. places: (m,) of the weights in W, flat.
    steps: (m,) +1 or −1.
    """

    gains: Tensor
    places: Tensor
    steps: Tensor

    def at_least(self, gain: float) -> Moves:
        """Those that promise as much."""
        return self.of(self.gains >= gain)

    def of(self, chosen: Tensor) -> Moves:
        """Those chosen by a mask or by their numbers."""
        return Moves(self.gains[chosen], self.places[chosen], self.steps[chosen])


class Moving:
    """A matrix (N, K) of the network, whose weights are the quantized ones and stay so.

    octaves: (C, K) float32, offset of each scale from the first one. A scale of 0 stays: nothing
    depends on it smoothly. felt: (N, K) float32, the mean gradient of the loss lately.
    """

    def __init__(
        self,
        matrix: Matrix,
        tensor: CompandedTensor,
        codebook: Codebook,
        statistics: MatrixStatistics | None,
    ) -> None:
        """statistics: of the matrix as it was measured; without them its curvature counts as 0."""
        device = matrix.parameter.device
        self.matrix, self.tensor = matrix, tensor
        rows = np.asarray(tensor.cluster_rows())
        cluster = np.repeat(np.arange(len(rows)), rows)
        self._order = tensor.source_to_stored[0]
        self.cluster = torch.from_numpy(cluster[self._order]).to(device)
        table = torch.from_numpy(codebook.scale_table[1:].astype(np.float64))
        self.ladder = torch.log2(table).float().to(device)
        self.middle = (self.ladder[1:] + self.ladder[:-1]) / 2
        scales = torch.from_numpy(tensor.scale_codes[0].astype(np.int64)).to(device)
        self.moves = scales > 0
        self.scale_codes = scales
        self.start = self.ladder[(scales - 1).clamp_min(0)]
        self.octaves = torch.zeros_like(self.start).requires_grad_(True)

        self.codes = torch.from_numpy(unpack_codes(tensor)[self._order]).to(device)
        self.felt = torch.zeros(tensor.shape, device=device)
        depths = tensor.depths[0]
        self._first = torch.from_numpy(first_levels(depths).astype(np.int32)).to(device)
        self._top = torch.from_numpy((1 << depths.astype(np.int32)) - 1).to(device)
        self._levels = torch.from_numpy(codebook.flat_levels()).to(device)
        gaps = [0.0, *(float(np.diff(codebook.levels[depth - 1]).max()) for depth in DEPTHS)]
        self._widest = torch.tensor(gaps, device=device)[torch.from_numpy(depths.astype(np.int64))]
        self._unit = torch.from_numpy(tensor.scales(codebook)[0]).to(device)  # of the first scales
        factors = tensor.row_scales()
        self._factors = None if factors is None else torch.from_numpy(factors[0]).to(device)
        self._moved: list[Moves] = []  # since `keep`
        self._curvature = _curvature(statistics, tensor.shape, device)

    @torch.no_grad()
    def feel(self, share: float) -> None:
        """Take the gradient that the loss left at the weights, for the scales and for the codes.

        share: of it in what is felt, the rest being what was felt before.
        """
        gradient = self._gradient()
        self.matrix.parameter.grad = None
        if gradient is None:
            return
        by_scale = torch.zeros_like(self.start)
        for rows in self._chunks():
            part = gradient[rows].float()
            self.felt[rows].lerp_(part, share)
            part = part * self.matrix.weight[rows]  # ∂loss / ∂ ln(scale), weight by weight
            by_scale.index_add_(0, self.cluster[rows], part)
        self.octaves.grad = by_scale.mul_(self.moves).mul_(float(np.log(2)))

    @torch.no_grad()
    def move_scales(self) -> None:
        """Take the scale codes nearest to the positions, and change the weights by that."""
        nearest = torch.bucketize(self.start + self.octaves, self.middle) + 1
        found = torch.where(self.moves, nearest, self.scale_codes)
        change = self._position(found) - self._position(self.scale_codes)
        if bool(change.any()):
            factor = torch.exp2(change)
            for rows in self._chunks():
                self.matrix.weight[rows].mul_(factor[self.cluster[rows]])
        self.scale_codes = found

    @torch.no_grad()
    def promising(self, count: int, share: float) -> Moves:
        """The codes that promise most, of each row and each column one, at most `count` of them.

        Comes before `feel`: what was felt and the gradient at the weights are of other sequences,
        and a code promises by the smaller one where they agree. share: of all gradients in what is
        felt, less than 1 in the first steps.
        """
        gradient = self._gradient()
        if gradient is None:
            nothing = torch.empty(0, dtype=torch.int64, device=self.felt.device)
            return self._moves(nothing, nothing.float())
        bound = self._units() * self._widest
        best: list[tuple[Tensor, Tensor]] = []
        for rows in self._chunks():
            score = _agreed(self.felt[rows] / share, gradient[rows].float())
            score *= bound[self.cluster[rows]]
            if self._factors is not None:
                score *= self._factors[rows, None]
            found = score.flatten().topk(min(count, score.numel()))
            best.append((found.values, found.indices + rows.start * self.felt.shape[1]))
        scores, places = (torch.cat(parts) for parts in zip(*best, strict=True))
        places = places[scores.topk(min(count, len(scores))).indices]
        at = self._at(places)
        now = gradient[at].float()
        slopes = _agreed(self.felt[at] / share, now).clamp_min(0) * now.sign()
        moves = self._moves(places, slopes)
        moves = moves.of(moves.gains.argsort(descending=True, stable=True))
        moves = moves.of(_first_of_each(self._at(moves.places)[0]))
        return moves.of(_first_of_each(self._at(moves.places)[1]))

    def _moves(self, places: Tensor, slopes: Tensor) -> Moves:
        """Moves down the slopes that promise something and lead to a level."""
        row, column = self._at(places)
        steps = -slopes.sign().int()
        after = self.codes[row, column].int() + steps
        may = (steps != 0) & (after >= 0) & (after <= self._top[self.cluster[row], column])
        places, steps, slopes = places[may], steps[may], slopes[may]
        change = self._change(places, steps)
        curvature = self._curvature[0][row[may]] * self._curvature[1][column[may]]
        gains = -slopes * change - curvature * change.square() / 2
        return Moves(gains, places, steps).at_least(SMALLEST_GAIN)

    @torch.no_grad()
    def move_codes(self, moves: Moves) -> None:
        """Move codes and weights; what was felt there no longer holds."""
        self._move(moves.places, moves.steps)
        self.felt[self._at(moves.places)] = 0
        self._moved.append(moves)

    def keep(self) -> None:
        """Never undo what was moved until now."""
        self._moved.clear()

    @torch.no_grad()
    def undo(self) -> None:
        """Move back the codes that moved since `keep`."""
        while self._moved:
            moves = self._moved.pop()
            self._move(moves.places, -moves.steps)

    def _move(self, places: Tensor, steps: Tensor) -> None:
        at, change = self._at(places), self._change(places, steps)
        self.codes[at] = (self.codes[at].int() + steps).to(torch.uint8)
        self.matrix.weight[at] += change.to(self.matrix.weight)

    def _change(self, places: Tensor, steps: Tensor) -> Tensor:
        """What weights change by if their codes move so."""
        row, column = self._at(places)
        cluster = self.cluster[row]
        level = self._first[cluster, column] + self.codes[row, column]
        change = self._levels[level + steps] - self._levels[level]
        change *= self._units()[cluster, column]
        return change if self._factors is None else change * self._factors[row]

    def _at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        columns = self.felt.shape[1]
        return places // columns, places % columns

    def _units(self) -> Tensor:
        """The scales of now."""
        return self._unit * torch.exp2(self._position(self.scale_codes) - self.start)

    def tensor_now(self) -> CompandedTensor:
        """The tensor with the codes in use."""
        stored = np.empty(self.tensor.shape, np.uint8)
        stored[self._order] = self.codes.cpu().numpy()
        tensor = self.tensor
        packed = pack_codes(stored[None], tensor.depths, tensor.group_size, tensor.partitions)
        scales = self.scale_codes[None].to(torch.uint8).cpu().numpy()
        return replace(tensor, scale_codes=scales, packed_codes=packed)

    def _gradient(self) -> Tensor | None:
        """Of the loss at the weights (N, K), if they were felt at all."""
        gradient = self.matrix.parameter.grad
        return gradient.T if gradient is not None and self.matrix.kind == "conv1d" else gradient

    def _position(self, scale_codes: Tensor) -> Tensor:
        return self.ladder[(scale_codes - 1).clamp_min(0)]

    def _chunks(self) -> Iterator[slice]:
        rows, columns = self.felt.shape
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))


def _agreed(a: Tensor, b: Tensor) -> Tensor:
    """Size of the smaller of two estimates where they have one sign, else at most 0."""
    return torch.minimum(a * b.sign(), b.abs())


def _first_of_each(numbers: Tensor) -> Tensor:
    """The places (m,), in order, where each of the numbers comes first."""
    _, which = torch.unique(numbers, return_inverse=True)
    places = torch.arange(len(numbers), device=numbers.device)
    first = torch.full_like(places, len(numbers)).scatter_reduce(0, which, places, "amin")
    return first[first < len(numbers)].sort().values


def _curvature(
    statistics: MatrixStatistics | None, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factors (N,) and (K,) of the second derivative of the loss by each weight."""
    if statistics is None:
        return torch.zeros(shape[0], device=device), torch.zeros(shape[1], device=device)
    rows = torch.from_numpy(statistics.row_sensitivity)
    columns = torch.from_numpy(statistics.column_sensitivity)
    rows = rows / rows.sum().clamp_min(1e-38)
    return rows.float().to(device), columns.float().to(device)

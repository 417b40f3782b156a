"""Groups → codes, scales, means, with or without error feedback.

Without feedback every group is quantized to least squared error on its own. With the Hessian H of
a matrix (`measure.hessian`), the columns are quantized one after the other in falling order of
H's diagonal, and the error of each is pushed onto the columns still to come, so that the error of
the layer's *output* is least (Optimal Brain Surgeon; GPTQ, arXiv 2210.17323). With H⁻¹ = Uᵀ U,
U upper triangular, column j of W in that order leaves the error e = (w_j − q_j) / U_jj, and every
later column k becomes w_k − e U_jk. Scales and means are searched when a column's turn comes, for
the weights as they are by then.

A column takes some hundred small operations, which cost their calls. So matrices of equal width go
side by side: their clusters are looked at together, and each has its own order and factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from cvxq_format import Codebook
from cvxq_format.limits import MAX_DEPTH

from cvxq_converter.allocate.clustering import Clustering
from cvxq_converter.measure.hessian import InverseFactor
from cvxq_converter.quantize.search import Choice, Chosen, Grid, Tables, make_grid, search_scales

BLOCK = 128  # columns whose errors are pushed onto the rest of the matrix at once
CHUNK = 1 << 16  # weights searched at once without feedback
TOGETHER = 1 << 25  # weights of one matrix whose columns are quantized in one go
SIDE_BY_SIDE = 1 << 23  # weights of several matrices whose columns are


@dataclass(frozen=True)
class QuantizedMatrix:
    """One quantized matrix (N, K), rows in stored order.

    codes: (N, K) uint8; scale_codes: (C, K) uint8; mean_codes: (C, K) int8 or None;
    depths: (C, K) uint8; scale_unit and mean_step: float32, see FORMAT.md.
    squared_error: (9,) float64 Σ (v − vq)² by bit depth. energy, projection: (9,) float64 Σ v² and
    Σ v·vq by bit depth, v being what was quantized: the weights less their group's mean, moved by
    the feedback if there was any.
    """

    clustering: Clustering
    depths: np.ndarray
    codes: np.ndarray
    scale_codes: np.ndarray
    mean_codes: np.ndarray | None
    scale_unit: np.float32
    mean_step: np.float32
    squared_error: np.ndarray
    energy: np.ndarray
    projection: np.ndarray


@dataclass(frozen=True)
class Task:
    """A matrix to quantize.

    weight: (N, K), rows in source order. depths: (C, K). moments: the groups' (mean, mean square),
    as `group_moments` gives them. row_weights: (N,), what an error in each row counts for, in
    stored order. feedback: of the Hessian, None to do without.
    """

    weight: torch.Tensor
    clustering: Clustering
    depths: np.ndarray
    moments: tuple[torch.Tensor, torch.Tensor]
    row_weights: np.ndarray
    with_means: bool
    feedback: InverseFactor | None = None

    def runs(self) -> list[slice]:
        """Clusters that are quantized in one go: none of them knows of any other."""
        size = int(self.clustering.cluster_rows.max()) * self.weight.shape[1]
        step, clusters = max(1, TOGETHER // size), self.clustering.clusters
        return [slice(first, min(first + step, clusters)) for first in range(0, clusters, step)]


def quantize_matrix(task: Task, codebook: Codebook, refine: bool = True) -> QuantizedMatrix:
    """Quantize one matrix with the codebook's levels."""
    return quantize_matrices([task], codebook, refine)[0]


def quantize_matrices(
    tasks: Sequence[Task], codebook: Codebook, refine: bool = True
) -> list[QuantizedMatrix]:
    """Quantize matrices of equal width with the codebook's levels.

    Several at once if they have no means, all have feedback, and no kernel `runs_fused`.
    """
    tables = Tables.of(codebook, tasks[0].weight.device)
    grids = [make_grid(*t.moments, codebook, with_means=t.with_means) for t in tasks]
    if len(tasks) > 1:
        whole = [slice(0, task.clustering.clusters) for task in tasks]
        pieces = [_Piece(*piece) for piece in zip(tasks, grids, whole, strict=True)]
        parts = [[part] for part in _Columns(pieces, tables, refine).quantized()]
    else:
        pieces = [_Piece(tasks[0], grids[0], run) for run in tasks[0].runs()]
        parts = [[_Columns([piece], tables, refine).quantized()[0] for piece in pieces]]
    return [_joined(*item) for item in zip(parts, tasks, grids, strict=True)]


def _joined(parts: list[_Quantized], task: Task, grid: Grid) -> QuantizedMatrix:
    means = [part.mean_codes for part in parts if part.mean_codes is not None]
    return QuantizedMatrix(
        clustering=task.clustering,
        depths=task.depths,
        codes=np.concatenate([part.codes for part in parts]),
        scale_codes=np.concatenate([part.scale_codes for part in parts]),
        mean_codes=np.concatenate(means) if means else None,
        scale_unit=grid.unit,
        mean_step=grid.mean_step,
        squared_error=sum(part.sums[0] for part in parts),
        energy=sum(part.sums[1] for part in parts),
        projection=sum(part.sums[2] for part in parts),
    )


@dataclass(frozen=True)
class _Piece:
    """Some clusters of a matrix, and the grid of the whole of it."""

    task: Task
    grid: Grid
    part: slice

    @property
    def sizes(self) -> np.ndarray:
        """(C,) int64 rows of each cluster."""
        return self.task.clustering.cluster_rows[self.part]

    @property
    def rows(self) -> slice:
        """Their stored positions."""
        bounds = self.task.clustering.bounds
        return slice(int(bounds[self.part.start]), int(bounds[self.part.stop]))

    def slots(self, group: int) -> torch.Tensor:
        """(N,) int64 place of each row among clusters that are padded to `group` rows."""
        sizes = self.sizes
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        places = np.repeat(np.arange(len(sizes)), sizes) * group + within
        return torch.from_numpy(places).to(self.task.weight.device)

    def columns(self) -> torch.Tensor:
        """(K, N) float32 weights in stored order, in units of the grid."""
        chosen = torch.from_numpy(self.task.clustering.permutation[self.rows])
        weight = self.task.weight[chosen.to(self.task.weight.device)].float()
        return (weight / max(float(self.grid.unit), 1e-38)).T


@dataclass(frozen=True)
class _Quantized:
    """Some clusters of a matrix; sums: (3, 9) float64, by depth, as in `QuantizedMatrix`."""

    codes: np.ndarray
    scale_codes: np.ndarray
    mean_codes: np.ndarray | None
    sums: np.ndarray


class _Columns:
    """The columns of some clusters on their way to codes, clusters padded to equal size.

    clusters: of each piece, among those of all pieces. weights: (K, C, G) float32 in units of the
    grid, padding 0; shares: (C, G) of each row in the error, padding 0; filled: (C, G) 1, padding
    0; sizes: (C,) int32 rows of each cluster; deep: (K, C) int64 depths.
    """

    def __init__(self, pieces: list[_Piece], tables: Tables, refine: bool) -> None:
        weight = pieces[0].task.weight
        sizes = np.concatenate([piece.sizes for piece in pieces])
        C, G, K, device = len(sizes), int(sizes.max()), weight.shape[1], weight.device
        ends = np.cumsum([len(piece.sizes) for piece in pieces]).tolist()
        self.clusters = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self.pieces, self.tables, self.grid, self.refine = pieces, tables, pieces[0].grid, refine
        self.weights = torch.zeros(K, C * G, device=device)
        self.shares = torch.zeros(C * G, device=device)
        self.filled = torch.zeros(C * G, device=device)
        for piece, own in zip(pieces, self.clusters, strict=True):
            slots = piece.slots(G) + own.start * G
            self.weights[:, slots] = piece.columns()
            self.shares[slots] = torch.from_numpy(piece.task.row_weights[piece.rows]).to(device)
            self.filled[slots] = 1
        self.weights = self.weights.view(K, C, G)
        self.shares, self.filled = self.shares.view(C, G), self.filled.view(C, G)
        self.sizes = torch.from_numpy(sizes.astype(np.int32)).to(device)
        depths = np.concatenate([piece.task.depths[piece.part] for piece in pieces])
        self.deep = torch.from_numpy(depths.T.astype(np.int64, order="C")).to(device)
        self.chosen = Chosen.empty(K, C, G, device)

    def quantized(self) -> list[_Quantized]:
        """Quantize all columns; one result for each piece."""
        feedback = [piece.task.feedback for piece in self.pieces]
        if feedback[0] is None:
            self._quantize_apart()
        elif runs_fused(self.weights.device):
            self._quantize_fused(feedback[0])
        else:
            self._quantize_in_turn([f for f in feedback if f is not None])
        return [self._result(*item) for item in zip(self.pieces, self.clusters, strict=True)]

    def _quantize_apart(self) -> None:
        """Quantize every group of the one piece on its own."""
        (piece,) = self.pieces
        unit = max(float(self.grid.unit), 1e-38)
        mean, mean_square = (moment[piece.part].T for moment in piece.task.moments)
        mean = (mean / unit).float().contiguous()
        mean_square = (mean_square / unit**2).float().contiguous()
        K, C, G = self.weights.shape
        step = max(1, CHUNK // (C * G))
        for start in range(0, K, step):
            part = slice(start, min(start + step, K))
            moments = mean[part], mean_square[part]
            found = self._search(self.weights[part], self.deep[part], moments)
            self.chosen.keep(part, found, self.filled)

    def _quantize_in_turn(self, feedback: list[InverseFactor]) -> None:
        """Quantize column by column, each error fed to the columns that follow in its piece.

        Errors of a block's columns reach the others of the block when their turn comes, and the
        rest of the columns after the block.
        """
        K, C, G = self.weights.shape
        weights, deep = torch.empty_like(self.weights), torch.empty_like(self.deep)
        pivots = torch.empty(K, C, 1, device=weights.device)
        for own, f in zip(self.clusters, feedback, strict=True):
            weights[:, own] = self.weights[f.order, own]
            deep[:, own] = self.deep[f.order, own]
            pivots[:, own, 0] = f.factor.diagonal()[:, None]
        turned = Chosen.empty(K, C, G, weights.device)
        shares = self.shares / self.shares.sum(1, keepdim=True)
        for low in range(0, K, BLOCK):
            high = min(low + BLOCK, K)
            errors = torch.empty((high - low, C, G), device=weights.device)
            for j in range(low, high):
                done = errors[: j - low]
                for own, f in zip(self.clusters, feedback, strict=True):
                    weights[j, own] -= _pushed(f.factor[low:j, j : j + 1], done[:, own])[0]
                column = weights[j : j + 1]
                shared = shares * column
                moments = shared.sum(-1), (shared * column).sum(-1)
                found = self._search(column, deep[j : j + 1], moments)
                turned.keep(slice(j, j + 1), found, self.filled)
                errors[j - low] = (column[0] - found.value[0]) / pivots[j]
            for own, f in zip(self.clusters, feedback, strict=True):
                weights[high:, own] -= _pushed(f.factor[low:high, high:], errors[:, own])
        for own, f in zip(self.clusters, feedback, strict=True):
            self.chosen.place(f.order, own, turned)

    def _quantize_fused(self, feedback: InverseFactor) -> None:
        """Quantize the one piece column by column, a block in one launch."""
        from cvxq_converter.quantize.feedback_kernel import (  # needs Triton
            FUSED_BLOCK,
            quantize_block,
        )

        order, factor = feedback.order, feedback.factor
        K, C, G = self.weights.shape
        weights = self.weights[order].view(K, C * G)
        shares = self.shares / self.shares.sum(1, keepdim=True)
        for low in range(0, K, FUSED_BLOCK):
            high = min(low + FUSED_BLOCK, K)
            errors = quantize_block(
                weights,
                shares,
                self.sizes,
                self.deep,
                order,
                factor,
                low,
                high,
                self.tables,
                self.grid,
                self.refine,
                self.chosen,
            )
            weights[high:] -= factor[low:high, high:].T @ errors

    def _search(
        self, weights: torch.Tensor, deep: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor]
    ) -> Choice:
        """Choose for some columns; weights: (k, C, G), deep and moments: (k, C)."""
        return search_scales(
            weights, self.shares, deep, moments, self.tables, self.grid, self.refine
        )

    def _result(self, piece: _Piece, own: slice) -> _Quantized:
        """Everything kept of a piece, in the units of the weights and in stored order."""
        chosen, group = self.chosen, self.weights.shape[2]
        slots = piece.slots(group) + own.start * group
        deep, sums = self.deep[:, own].flatten().cpu().numpy(), chosen.sums[:, :, own].flatten(1)
        by_depth = [np.bincount(deep, v, minlength=MAX_DEPTH + 1) for v in sums.cpu().numpy()]
        means = chosen.mean_codes[:, own].T.contiguous().cpu().numpy()
        return _Quantized(
            codes=chosen.codes[:, slots].T.contiguous().cpu().numpy(),
            scale_codes=chosen.scale_codes[:, own].T.contiguous().cpu().numpy(),
            mean_codes=means if piece.task.with_means else None,
            sums=np.stack(by_depth) * float(piece.grid.unit) ** 2,
        )


def _pushed(factor: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """What the errors (k, C, G) of k columns take from n others, (n, C, G); factor: (k, n)."""
    return (factor.T @ errors.flatten(1)).view(-1, *errors.shape[1:])


def runs_fused(device: torch.device) -> bool:
    """Whether a block of columns is quantized by one kernel (NVIDIA, AMD) or by PyTorch."""
    return device.type == "cuda" and find_spec("triton") is not None

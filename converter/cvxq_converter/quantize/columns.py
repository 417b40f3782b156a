"""Groups → codes, scales, means, with or without error feedback.

Without feedback every group is quantized to least squared error on its own. With the Hessian H of
a matrix (`measure.hessian`), the columns are quantized one after the other in falling order of
H's diagonal, and the error of each is pushed onto the columns still to come, so that the error of
the layer's *output* is least (Optimal Brain Surgeon; GPTQ, arXiv 2210.17323). With H⁻¹ = Uᵀ U,
U upper triangular, column j of W in that order leaves the error e = (w_j − q_j) / U_jj, and every
later column k becomes w_k − e U_jk. Scales and means are searched when a column's turn comes, for
the weights as they are by then.
"""

from __future__ import annotations

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
TOGETHER = 1 << 25  # weights of a matrix whose columns are quantized in one go


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


def quantize_matrix(
    weight: torch.Tensor,
    clustering: Clustering,
    depths: np.ndarray,
    codebook: Codebook,
    *,
    with_means: bool,
    refine: bool = True,
    moments: tuple[torch.Tensor, torch.Tensor],
    row_weights: np.ndarray,
    feedback: InverseFactor | None = None,
) -> QuantizedMatrix:
    """Quantize weight (N, K) with the depths (C, K) and the codebook's levels.

    moments: the groups' (mean, mean square), as `group_moments` gives them. row_weights: (N,), what
    an error in each row counts for, in stored order. feedback: of the Hessian, None to do without.
    """
    grid = make_grid(*moments, codebook, with_means=with_means)
    tables = Tables.of(codebook, weight.device)
    parts = []
    for part in _runs(clustering, weight.shape[1]):
        rows = slice(int(clustering.bounds[part.start]), int(clustering.bounds[part.stop]))
        taken = weight[torch.from_numpy(clustering.permutation[rows]).to(weight.device)].float()
        sizes = clustering.cluster_rows[part]
        columns = _Columns(taken, sizes, depths[part], tables, grid, row_weights[rows], refine)
        if feedback is None:
            columns.quantize_apart((moments[0][part], moments[1][part]))
        else:
            columns.quantize_in_turn(feedback)
        parts.append(columns.result(with_means))
    return _joined(parts, clustering, depths, grid)


def _runs(clustering: Clustering, columns: int) -> list[slice]:
    """Clusters that are quantized together: none of them knows of any other."""
    step = max(1, TOGETHER // (int(clustering.cluster_rows.max()) * columns))
    return [
        slice(first, min(first + step, clustering.clusters))
        for first in range(0, clustering.clusters, step)
    ]


def _joined(
    parts: list[_Quantized], clustering: Clustering, depths: np.ndarray, grid: Grid
) -> QuantizedMatrix:
    means = [part.mean_codes for part in parts if part.mean_codes is not None]
    return QuantizedMatrix(
        clustering=clustering,
        depths=depths,
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
class _Quantized:
    """Some clusters of a matrix; sums: (3, 9) float64, by depth, as in `QuantizedMatrix`."""

    codes: np.ndarray
    scale_codes: np.ndarray
    mean_codes: np.ndarray | None
    sums: np.ndarray


class _Columns:
    """The columns of some clusters on their way to codes, clusters padded to equal size.

    weights: (K, C, G) float32 in units of the grid, padding 0; shares: (C, G) of each row in the
    error, padding 0; filled: (C, G) 1, padding 0; sizes: (C,) int32 rows of each cluster; slots:
    (N,) place of each stored row in C·G.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        rows: np.ndarray,
        depths: np.ndarray,
        tables: Tables,
        grid: Grid,
        row_weights: np.ndarray,
        refine: bool,
    ) -> None:
        """weight: (N, K) in stored order; rows: (C,) of each cluster."""
        device = weight.device
        C, G, K = len(rows), int(rows.max()), weight.shape[1]
        within = np.arange(len(weight)) - np.repeat(np.cumsum(rows) - rows, rows)
        slots = np.repeat(np.arange(C), rows) * G + within
        self.slots = torch.from_numpy(slots).to(device)
        self.depths, self.tables, self.grid, self.refine = depths, tables, grid, refine
        self.weights = torch.zeros(K, C * G, device=device)
        self.weights[:, self.slots] = (weight / max(float(grid.unit), 1e-38)).T
        self.weights = self.weights.view(K, C, G)
        shares = torch.zeros(C * G, device=device)
        shares[self.slots] = torch.from_numpy(row_weights).to(device)
        self.shares = shares.view(C, G)
        self.sizes = torch.from_numpy(rows.astype(np.int32)).to(device)
        filled = torch.zeros(C * G, device=device)
        filled[self.slots] = 1
        self.filled = filled.view(C, G)
        self.deep = torch.from_numpy(depths.T.astype(np.int64, order="C")).to(device)
        self.chosen = Chosen.empty(K, C, G, device)

    def quantize_apart(self, moments: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Quantize every group on its own; moments: (C, K) in weight units."""
        unit = max(float(self.grid.unit), 1e-38)
        mean = (moments[0].T / unit).float().contiguous()
        mean_square = (moments[1].T / unit**2).float().contiguous()
        K, C, G = self.weights.shape
        step = max(1, CHUNK // (C * G))
        for start in range(0, K, step):
            part = slice(start, min(start + step, K))
            self._quantize(part, self.weights[part], (mean[part], mean_square[part]))

    def quantize_in_turn(self, feedback: InverseFactor) -> None:
        """Quantize column by column, each error fed to the columns that follow."""
        order, factor = feedback.order, feedback.factor
        K, C, G = self.weights.shape
        weights = self.weights[order].view(K, C * G)
        shares = self.shares / self.shares.sum(1, keepdim=True)
        if runs_fused(weights.device):
            from cvxq_converter.quantize.feedback_kernel import FUSED_BLOCK  # needs Triton

            block, run = FUSED_BLOCK, self._fused_block
        else:
            block, run = BLOCK, self._block
        for low in range(0, K, block):
            high = min(low + block, K)
            errors = run(weights, shares, feedback, low, high)
            weights[high:] -= factor[low:high, high:].T @ errors

    def _block(
        self,
        weights: torch.Tensor,
        shares: torch.Tensor,
        feedback: InverseFactor,
        low: int,
        high: int,
    ) -> torch.Tensor:
        """Quantize the columns low … high of the order; returns their errors (high − low, C·G)."""
        order, factor = feedback.order, feedback.factor
        errors = torch.empty((high - low, weights.shape[1]), device=weights.device)
        for j in range(low, high):
            column = weights[j].view(1, *shares.shape)
            shared = shares * column
            moments = shared.sum(-1), (shared * column).sum(-1)
            found = self._quantize(order[j : j + 1], column, moments)
            error = (weights[j] - found.value.view(-1)) / factor[j, j]
            errors[j - low] = error
            weights[j + 1 : high].addr_(factor[j, j + 1 : high], error, alpha=-1)
        return errors

    def _fused_block(
        self,
        weights: torch.Tensor,
        shares: torch.Tensor,
        feedback: InverseFactor,
        low: int,
        high: int,
    ) -> torch.Tensor:
        """`_block` in one launch."""
        from cvxq_converter.quantize.feedback_kernel import quantize_block  # needs Triton

        return quantize_block(
            weights,
            shares,
            self.sizes,
            self.deep,
            feedback.order,
            feedback.factor,
            low,
            high,
            self.tables,
            self.grid,
            self.refine,
            self.chosen,
        )

    def _quantize(
        self,
        columns: slice | torch.Tensor,
        weights: torch.Tensor,
        moments: tuple[torch.Tensor, torch.Tensor],
    ) -> Choice:
        """Choose for some columns, and keep the choices; weights: (k, C, G), moments: (k, C)."""
        deep = self.deep[columns]
        found = search_scales(
            weights, self.shares, deep, moments, self.tables, self.grid, self.refine
        )
        self.chosen.keep(columns, found, self.filled)
        return found

    def result(self, with_means: bool) -> _Quantized:
        """Everything kept, in the units of the weights and in stored order."""
        chosen = self.chosen
        deep, sums = self.depths.T.ravel(), chosen.sums.flatten(1).cpu().numpy()
        by_depth = [np.bincount(deep, values, minlength=MAX_DEPTH + 1) for values in sums]
        means = chosen.mean_codes.T.contiguous().cpu().numpy() if with_means else None
        return _Quantized(
            codes=chosen.codes[:, self.slots].T.contiguous().cpu().numpy(),
            scale_codes=chosen.scale_codes.T.contiguous().cpu().numpy(),
            mean_codes=means,
            sums=np.stack(by_depth) * float(self.grid.unit) ** 2,
        )


def runs_fused(device: torch.device) -> bool:
    """Whether a block of columns is quantized by one kernel (NVIDIA, AMD) or by PyTorch."""
    return device.type == "cuda" and find_spec("triton") is not None

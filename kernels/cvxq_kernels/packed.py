"""One quantized matrix in memory, packed as in the file.

The codes are bit planes (FORMAT.md): for every (cluster, column) group of depth B there are B
planes of `ceil(n / 8)` bytes, n being the rows of the cluster.  They are never copied on a CPU:
the tensor below is the file's mapping.  Beside them stand the depths and scale codes, one byte
per group, so a matrix of N·K weights in groups of G costs its codes plus 2/G bytes per weight.
Offsets of groups are sums of depths and are computed when needed rather than kept (they would
cost 8/G bytes per weight).

Expansion with torch operations, bit-equal to `cvxq_format.dequantize`, is for where no kernel does
it: to expand a whole matrix when a model is loaded (`weights="dense"`, raw modules, the plain torch
decoder), products and look-ups on a CPU without the native library or in another type than float32,
gradients, and on a GPU weights that `cvxq_kernels.gpu` does not take (transposed, as round to
nearest stores them, and stacked).  A bounded number of weights is decoded at a time, so that the
temporaries stay small beside the result.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from cvxq_format import Codebook, CompandedTensor

from cvxq_kernels.planes import decode_groups, decode_rows, group_starts, look_up, plane_bytes
from cvxq_kernels.tables import decoding_tables

CHUNK_WEIGHTS = 1 << 18  # decoded per step: about 3 MB of temporaries


class UnsupportedWeightError(ValueError):
    """A weight that the GPU kernels do not take; the text says why."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A companded matrix (N, K), or E stacked ones (E, N, K), held as torch tensors.

    The *stored* matrix is (R, C) = W, or Wᵀ when `transposed`; its rows are cut into clusters.
    codes: 1-D uint8; depths, scale_codes: (E, clusters, columns) uint8; mean_codes: the same
    shape, int8, or None; row_of_position and position_of_row: (E, R) int64, or None when rows
    are stored in order; cluster_first_row and cluster_rows: (clusters,) int64;
    cluster_offset: (E, clusters) int64, bytes into `codes`. row_factors: (E, N) float32, what each
    output is multiplied by, or None; never with `transposed`.
    scales, means, levels: float32, see `DecodingTables`.
    """

    shape: tuple[int, ...]
    group_size: int
    transposed: bool
    codes: torch.Tensor
    depths: torch.Tensor
    scale_codes: torch.Tensor
    mean_codes: torch.Tensor | None
    row_of_position: torch.Tensor | None
    position_of_row: torch.Tensor | None
    cluster_first_row: torch.Tensor
    cluster_rows: torch.Tensor
    cluster_offset: torch.Tensor
    row_factors: torch.Tensor | None
    scales: torch.Tensor
    means: torch.Tensor
    levels: torch.Tensor

    @classmethod
    def from_tensor(cls, tensor: CompandedTensor, codebook: Codebook) -> PackedWeight:
        """Wrap a tensor read from a file; the codes stay in the file's mapping."""
        rows = np.asarray(tensor.cluster_rows(), np.int64)
        sizes = tensor.depths.sum(axis=2, dtype=np.int64) * ((rows + 7) // 8)
        ends = np.cumsum(sizes.reshape(-1)).reshape(sizes.shape)
        order, factors = tensor.permutation, tensor.row_scales()
        tables = decoding_tables(tensor, codebook)
        return cls(
            shape=tuple(int(n) for n in tensor.shape),
            group_size=int(tensor.group_size),
            transposed=bool(tensor.transposed),
            codes=_borrow(tensor.packed_codes),
            depths=_borrow(tensor.depths),
            scale_codes=_borrow(tensor.scale_codes),
            mean_codes=None if tensor.mean_codes is None else _borrow(tensor.mean_codes),
            row_of_position=None if order is None else _borrow(order),
            position_of_row=None if order is None else _borrow(np.argsort(order, axis=1)),
            cluster_first_row=torch.from_numpy(np.cumsum(rows) - rows),
            cluster_rows=_borrow(rows),
            cluster_offset=torch.from_numpy(ends - sizes),
            row_factors=None if factors is None else _borrow(factors),
            scales=torch.from_numpy(tables.scales),
            means=torch.from_numpy(tables.means),
            levels=torch.from_numpy(tables.levels),
        )

    @property
    def experts(self) -> int:
        """E, the number of stacked matrices (1 for a plain matrix)."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, the mapped codes included."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, torch.Tensor))

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the same weight on `device`; nothing is copied when it is there already."""
        moved: dict[str, Any] = {
            field.name: part.to(device)
            for field in fields(self)
            if isinstance(part := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Expand everything to (N, K) or (E, N, K) in `dtype`; decoded in float32, then cast."""
        outputs, inputs = self.shape[-2:]
        rows, columns = (inputs, outputs) if self.transposed else (outputs, inputs)
        result = torch.empty((self.experts, rows, columns), dtype=dtype, device=self.device)
        step = max(1, CHUNK_WEIGHTS // (self.group_size * columns))
        for expert in range(self.experts):
            for first, last in _runs(self.cluster_rows.tolist(), step):
                order, block = _stored_block(self, expert, first, last)
                result[expert].index_copy_(0, order, block.to(dtype))
        if self.transposed:
            result = result.transpose(1, 2).contiguous()
        return result if len(self.shape) == 3 else result[0]

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Expand rows `ids` (any shape, int) of a plain matrix to `ids.shape + (K,)`.

        Only the bytes of these rows are read, which is what an embedding look-up needs.  Raises
        ValueError for stacked matrices, IndexError for a row outside.
        """
        if len(self.shape) != 2:
            raise ValueError(f"rows of a stacked weight {self.shape} are not defined; use dense()")
        unique, inverse = torch.unique(ids.to(self.device), return_inverse=True)
        if len(unique) and (unique[0] < 0 or unique[-1] >= self.shape[0]):
            raise IndexError(
                f"row ids span {int(unique[0])}..{int(unique[-1])}, allowed 0..{self.shape[0] - 1}"
            )
        take = _stored_columns if self.transposed else _stored_rows
        step = max(1, CHUNK_WEIGHTS // self.shape[1])
        parts = [take(self, part) for part in unique.split(step)]
        return torch.cat(parts).to(dtype)[inverse]


def _borrow(array: np.ndarray) -> torch.Tensor:
    """View a numpy array as a tensor, read-only mappings included (nothing here writes)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def _runs(heights: list[int], step: int) -> list[tuple[int, int]]:
    """Cut the clusters into runs [first, last) of one height and at most `step` clusters."""
    runs: list[tuple[int, int]] = []
    for index, height in enumerate(heights):
        if runs and heights[runs[-1][0]] == height and index - runs[-1][0] < step:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def _stored_block(
    weight: PackedWeight, expert: int, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n,) int64 that clusters [first, last) of equal height are, and (n, columns) float32."""
    block = _clusters(weight, expert, first, last)
    start = int(weight.cluster_first_row[first])
    order = torch.arange(start, start + len(block), device=weight.device)
    if weight.row_of_position is not None:
        order = weight.row_of_position[expert, start : start + len(block)]
    if weight.row_factors is not None:
        block = block * weight.row_factors[expert, order, None]
    return order, block


def _stored_rows(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix stored as it is: (len(ids), K) float32."""
    position = ids if weight.position_of_row is None else weight.position_of_row[0, ids]
    cluster = torch.searchsorted(weight.cluster_first_row, position, right=True) - 1
    depths = weight.depths[0, cluster].to(torch.int64)
    heights = weight.cluster_rows[cluster]
    code = decode_rows(
        weight.codes,
        depths,
        starts=group_starts(depths, weight.cluster_offset[0, cluster], heights),
        planes=plane_bytes(heights),
        places=position - weight.cluster_first_row[cluster],
    )
    values = _weights(weight, look_up(weight.levels, code + (1 << depths)), (0, cluster))
    return values if weight.row_factors is None else values * weight.row_factors[0, ids, None]


def _stored_columns(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Rows of W that are columns of the stored Wᵀ: (len(ids), K) float32."""
    runs = _runs(weight.cluster_rows.tolist(), len(weight.cluster_rows))
    stored = torch.cat([_clusters(weight, 0, first, last, ids) for first, last in runs])
    return (stored if weight.position_of_row is None else stored[weight.position_of_row[0]]).t()


def _clusters(
    weight: PackedWeight, expert: int, first: int, last: int, columns: Any = slice(None)
) -> torch.Tensor:
    """Decode `columns` of clusters [first, last) of equal height to (stored rows, k) float32."""
    some = slice(first, last)
    depths, heights = weight.depths[expert, some], weight.cluster_rows[some]
    starts = group_starts(depths, weight.cluster_offset[expert, some], heights)[:, columns]
    depths, height, plane = depths[:, columns], int(heights[0]), int(plane_bytes(heights[0]))
    codes = decode_groups(weight.codes, depths.reshape(-1), starts.reshape(-1), plane)
    # int32 indices: 2^B + q, found with the group's depth; then everything is element-wise.
    index = codes.to(torch.int32) + (1 << depths.reshape(-1, 1).to(torch.int32))
    level = look_up(weight.levels, index).reshape(*depths.shape, plane * 8)[..., :height]
    values = _weights(weight, level, (expert, some, columns))
    return values.transpose(1, 2).reshape(-1, depths.shape[1])


def _weights(weight: PackedWeight, level: torch.Tensor, groups: tuple[Any, ...]) -> torch.Tensor:
    """Make weights of levels, in place; the first axes of `level` are those of `groups`.

    The normative arithmetic, in float32, each operation rounded: w = S · (level + t), or S · level
    where the matrix stores no means; the row's factor, where there is one, comes last.
    """
    chosen = weight.scale_codes[groups]
    wide = (*chosen.shape, *[1] * (level.dim() - chosen.dim()))
    if weight.mean_codes is not None:
        mean = look_up(weight.means, weight.mean_codes[groups].to(torch.int32) + 128)
        level += mean.reshape(wide)
    return level.mul_(look_up(weight.scales, chosen.to(torch.int32)).reshape(wide))

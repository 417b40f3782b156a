"""One quantized matrix in memory, packed as in the file.

The codes are bit planes (FORMAT.md): for every (cluster, column) group of depth B there are B
planes of `ceil(n / 8)` bytes, n being the rows of the cluster.  They are never copied on a CPU:
the tensor below is the file's mapping.  Beside them stand the depths and scale codes, one byte
per group, so a matrix of N·K weights in groups of G costs its codes plus 2/G bytes per weight.
Offsets of groups are sums of depths and are computed when needed rather than kept (they would
cost 8/G bytes per weight).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from cvxq_format import Codebook, CompandedTensor

from cvxq_kernels.dequantize import reference


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A companded matrix (N, K), or E stacked ones (E, N, K), held as torch tensors.

    The *stored* matrix is (R, C) = W, or Wᵀ when `transposed`; its rows are cut into clusters.
    codes: 1-D uint8; depths, scale_codes: (E, clusters, columns) uint8; mean_codes: the same
    shape, int8, or None; row_of_position and position_of_row: (E, R) int64, or None when rows
    are stored in order; cluster_first_row and cluster_rows: (clusters,) int64;
    cluster_offset: (E, clusters) int64, bytes into `codes`. row_factors: (E, N) float32, what each
    output is multiplied by, or None; never with `transposed`.
    scales: (2^s,) float32, the scale table times the matrix's scale unit; means: (256,) float32,
    the mean of code i at [i + 128]; levels: (512,) float32, depth B's table at [2^B, 2^(B+1)).
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
        plane_bytes = (rows + 7) // 8
        sizes = tensor.depths.sum(axis=2, dtype=np.int64) * plane_bytes
        ends = np.cumsum(sizes.reshape(-1)).reshape(sizes.shape)
        order, factors = tensor.permutation, tensor.row_scales()
        scales = np.float32(tensor.scale_unit) * codebook.scale_table.astype(np.float32)
        means = np.arange(-128, 128, dtype=np.float32) * np.float32(tensor.mean_step)
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
            scales=torch.from_numpy(scales),
            means=torch.from_numpy(means),
            levels=torch.from_numpy(_joined_levels(codebook)),
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
        return reference.dense(self, dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Expand rows `ids` (any shape, int) of a plain matrix to `ids.shape + (K,)`.

        Only the bytes of these rows are read, which is what an embedding look-up needs.
        """
        return reference.rows(self, ids, dtype)


def _borrow(array: np.ndarray) -> torch.Tensor:
    """View a numpy array as a tensor, read-only mappings included (nothing here writes)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def _joined_levels(codebook: Codebook) -> np.ndarray:
    """All level tables in one: index 2^B + q holds level q of depth B; depth 0 has the level 0."""
    joined = np.zeros(512, np.float32)
    for depth, table in enumerate(codebook.levels, start=1):
        joined[2**depth : 2 ** (depth + 1)] = table
    return joined

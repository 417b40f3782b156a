"""`GpuWeight`: a packed matrix on a GPU, and what can be done with it.

Three ways to multiply, by the number of rows of the input: `matvec` (integer activations of 8 bits,
or "matvec16" of 16, up to 8 rows at a time), `gemm` (tiles decoded into tensor-core operands), and
expanding the weight into a scratch for the vendor's GEMM.  Which one serves a batch is a `Plan`,
measured by `tune` and otherwise guessed from the batch.  No operation waits for the device, and
once a batch size has been used, repeating it allocates nothing but its result: operations can be
captured in a CUDA graph after one call outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cvxq_kernels.gpu import launch
from cvxq_kernels.gpu.matrix import CLUSTER, DeviceMatrix, arrange
from cvxq_kernels.gpu.plan import GEMM_ROWS, MATVEC_ROWS, Plan, bucket, choose_plan
from cvxq_kernels.gpu.repack import chunk_places
from cvxq_kernels.gpu.tune import tune
from cvxq_kernels.gpu.workspace import Workspace, default_workspace
from cvxq_kernels.packed import PackedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class GpuWeight:
    """One (N, K) matrix, or several that share their input, in the layout of the GPU kernels."""

    def __init__(self, matrix: DeviceMatrix, workspace: Workspace | None = None):
        """Wrap an arranged matrix; `workspace` is the device's own unless given."""
        self.matrix = matrix
        self.device = matrix.words.device
        self.workspace = workspace or default_workspace(self.device)
        self.plans: dict[int, Plan] = {}
        self.index = _index(matrix)
        self.processors = (
            torch.cuda.get_device_properties(self.device).multi_processor_count
            if self.device.type == "cuda"
            else 1
        )

    @classmethod
    def from_packed(cls, weight: PackedWeight, device: torch.device | str) -> GpuWeight:
        """Repack `weight` on `device`; UnsupportedWeightError for stacked or transposed ones."""
        return cls(arrange([weight], torch.device(device)))

    @classmethod
    def fused(cls, weights: Sequence[PackedWeight], device: torch.device | str) -> GpuWeight:
        """Repack weights with equal K into one whose outputs are theirs, side by side."""
        return cls(arrange(weights, torch.device(device)))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K); N counts all outputs of fused matrices."""
        return sum(self.matrix.outputs), self.matrix.inputs

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix holds on the device, the shared workspace not counted."""
        return self.matrix.nbytes + sum(part.nbytes for part in vars(self.index).values())

    def matmul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """Return x · Wᵀ + bias.

        x: (M, K) float16, bfloat16 or float32 on the device, rows contiguous. bias: (N,) or None.
        out: (M, N) to write to, of x's type, rows contiguous. plan: in place of the chosen one.
        The result has x's type, whatever the plan; see `matvec` and `gemm` for what is rounded.
        """
        outputs, inputs = self.shape
        if x.dim() != 2 or x.shape[1] != inputs or x.dtype not in FLOATS:
            raise ValueError(
                f"input {tuple(x.shape)} {x.dtype}: (M, {inputs}) in float16, bfloat16 or float32"
            )
        x = x if x.stride(1) == 1 else x.contiguous()
        if out is None:
            out = torch.empty((len(x), outputs), dtype=x.dtype, device=x.device)
        chosen = plan or self.plan_for(len(x))
        if chosen.kind == "expand":
            return launch.expand_and_multiply(self, x, bias, out)
        step, run = (
            (GEMM_ROWS, launch.gemm) if chosen.kind == "gemm" else (MATVEC_ROWS, launch.matvec)
        )
        for start in range(0, len(x), step):
            run(self, x[start : start + step], bias, out[start : start + step], chosen)
        return out

    def plan_for(self, batch: int) -> Plan:
        """Return the plan that `matmul` uses for `batch` rows."""
        known = self.plans.get(bucket(batch))
        if known is not None:
            return known
        tiles = len(self.matrix.tiles)
        return choose_plan(batch, tiles, self.matrix.slots // tiles, self.processors)

    def tune(self, batches: Sequence[int], dtype: torch.dtype) -> None:
        """Measure plans for `batches` rows in `dtype`, or recall them from the cache on disk."""
        tune(self, batches, dtype)

    def dense(
        self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Expand to (N, K) in `dtype`, bit-equal to `PackedWeight.dense`."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        return launch.expand(self, out, natural=True)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Expand rows `ids` (any shape, int, 0 … N − 1, not checked) to `ids.shape + (K,)`."""
        out = torch.empty((*ids.shape, self.shape[1]), dtype=dtype, device=self.device)
        if out.numel():
            launch.rows(self, ids.reshape(-1), out.view(-1, self.shape[1]))
        return out


class Index:
    """Look-up tables that are not part of the matrix: by slot, row and cluster."""

    def __init__(self, tile_of_slot: torch.Tensor, place_of_row: torch.Tensor, tile: torch.Tensor):
        """See `_index`."""
        self.tile_of_slot = tile_of_slot
        self.place_of_row = place_of_row
        self.first_tile_of_cluster = tile


def _index(matrix: DeviceMatrix) -> Index:
    """Tile of every slot; tile · rows + row of every output; a tile of every cluster."""
    device = matrix.words.device
    tile, _, _ = chunk_places(matrix.tiles, matrix.chunks)
    valid = matrix.row_of >= 0
    place_of_row = torch.empty(sum(matrix.outputs), dtype=torch.int32, device=device)
    places = torch.arange(len(matrix.row_of), dtype=torch.int32, device=device)
    place_of_row[matrix.row_of[valid].to(torch.int64)] = places[valid]
    cluster = matrix.tiles[:, CLUSTER].to(torch.int64)
    first = torch.full((len(matrix.runs),), len(cluster), device=device)
    ordinal = torch.arange(len(cluster), device=device)
    first = first.scatter_reduce(0, cluster, ordinal, "amin")
    return Index(tile.to(torch.int32), place_of_row, first.to(torch.int32))

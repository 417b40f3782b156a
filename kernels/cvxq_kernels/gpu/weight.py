"""`GpuWeight`: a packed matrix on a GPU, and what can be done with it.

Three ways to multiply, by the number of rows of the input: `matvec` (integer activations of 8 bits,
or "matvec16" of 16, up to 8 rows at a time), `gemm` (tiles decoded into tensor-core operands), and
expanding the weight into a scratch for the vendor's GEMM.  Which one serves a batch is a `Plan`,
measured by `tuning.tune` and otherwise guessed from the batch.  No operation waits for the device,
and once a batch size has been used, repeating it allocates nothing but its result: operations can
be captured in a CUDA graph after one call outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cvxq_kernels.gpu.device import processors
from cvxq_kernels.gpu.launch import Product, expand, expand_and_multiply, gemm, matvec, rows
from cvxq_kernels.gpu.matrix import DeviceMatrix, arrange
from cvxq_kernels.gpu.plan import GEMM_ROWS, MATVEC_ROWS, Plan, bucket, choose_plan
from cvxq_kernels.gpu.workspace import Workspace, default_workspace
from cvxq_kernels.packed import PackedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class GpuWeight:
    """One (N, K) matrix, or several that share their input, in the layout of the GPU kernels."""

    def __init__(self, matrix: DeviceMatrix, workspace: Workspace | None = None):
        """Wrap an arranged matrix; `workspace` is the device's own unless given."""
        self.matrix = matrix
        self.device = matrix.device
        self.workspace = workspace or default_workspace(self.device)
        self.plans: dict[int, Plan] = {}
        self.processors = processors(self.device)

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
        return self.matrix.shape

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix holds on the device, the shared workspace not counted."""
        return self.matrix.nbytes

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
        whole = Product(x, bias, out)
        chosen = plan or self.plan_for(len(x))
        if chosen.kind == "expand":
            return expand_and_multiply(self.matrix, self.workspace, whole)
        step, run = (GEMM_ROWS, gemm) if chosen.kind == "gemm" else (MATVEC_ROWS, matvec)
        for start in range(0, len(x), step):
            run(self.matrix, self.workspace, whole.part(start, start + step), chosen)
        return out

    def plan_for(self, batch: int) -> Plan:
        """Return the plan that `matmul` uses for `batch` rows."""
        return self.plans.get(bucket(batch)) or choose_plan(batch, self.processors)

    def dense(
        self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Expand to (N, K) in `dtype`, bit-equal to `PackedWeight.dense`."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        return expand(self.matrix, out, natural=True)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Expand rows `ids` (any shape, int, 0 … N − 1, not checked) to `ids.shape + (K,)`."""
        out = torch.empty((*ids.shape, self.shape[1]), dtype=dtype, device=self.device)
        if out.numel():
            rows(self.matrix, ids.reshape(-1), out.view(-1, self.shape[1]))
        return out

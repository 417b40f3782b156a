"""Grids, scratch and arguments of the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from cvxq_kernels.gpu.expand import expand_kernel, rows_kernel
from cvxq_kernels.gpu.gemm import gemm_kernel, transpose_kernel
from cvxq_kernels.gpu.matvec import matvec_kernel
from cvxq_kernels.gpu.means import WIDTH, means_kernel
from cvxq_kernels.gpu.plan import Plan
from cvxq_kernels.gpu.repack import places_on

if TYPE_CHECKING:
    from cvxq_kernels.gpu.weight import GpuWeight

TRANSPOSE_BLOCK = 1024
ROW_CHUNKS = 16  # chunks of a row that a program of `rows` reads


def uses_ptx(device: torch.device) -> bool:
    """Tell whether kernels on `device` may contain PTX: not in the interpreter, not on AMD."""
    return device.type == "cuda" and torch.version.hip is None


def depth_set(depths: int) -> int:
    """Round a set of depths (bit B for depth B) up to one that kernels are compiled for.

    A single depth, 1–4 or 1–8: few variants to compile, and loops over absent depths cost little.
    """
    depths &= ~1
    if depths & (depths - 1) == 0:
        return depths
    return 0b11110 if depths < 32 else 0b111111110


def matvec(
    weight: GpuWeight, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, plan: Plan
) -> None:
    """out (M, N) = x (M, K) · Wᵀ + bias with integer activations, M ≤ 8."""
    matrix, work, wide = weight.matrix, weight.workspace, plan.kind == "matvec16"
    rows = triton.next_power_of_2(len(x))
    tiles = len(matrix.tiles)
    depths = depth_set(matrix.depths)
    cells = rows * matrix.slots
    means, clusters = _means(weight, x)
    matvec_kernel[(tiles, plan.splits)](
        matrix.words, matrix.tiles, matrix.runs, matrix.chunks, matrix.order,
        matrix.scale_codes.view(torch.int64), matrix.scales,
        matrix.wide_words if wide else matrix.byte_words, matrix.exact,
        matrix.units, matrix.row_of, matrix.factors,
        x, x.stride(0), len(x), means, clusters, out if bias is None else bias, out, out.stride(0),
        work.take("acts8", (8 if wide else 4) * cells, torch.int64),
        work.take("acts32", 16 * cells if depths >= 32 else 1, torch.int64),
        work.take("steps", cells, torch.float32), matrix.slots,
        work.take("partial", plan.splits * rows * tiles * matrix.rows, torch.float32),
        work.take("arrived", tiles, torch.int32), plan.splits,
        M=rows, ROWS=matrix.rows, DEPTHS=depths, SPLIT=plan.splits > 1,
        HAS_MEANS=matrix.mean_codes is not None, HAS_BIAS=bias is not None, UNROLL=plan.unroll,
        WIDE=wide, PTX=uses_ptx(weight.device), num_warps=1,
    )  # fmt: skip


def gemm(
    weight: GpuWeight, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, plan: Plan
) -> None:
    """out (M, N) = x (M, K) · Wᵀ + bias with float16 operands, M ≤ 256."""
    matrix, work = weight.matrix, weight.workspace
    inputs, tiles = matrix.inputs, len(matrix.tiles)
    batch = max(triton.next_power_of_2(len(x)), plan.tile_batch)
    transposed = work.take("transposed", inputs * batch, torch.float16)
    largest = work.take("largest", batch, torch.float32)
    transpose_kernel[(batch, triton.cdiv(inputs, TRANSPOSE_BLOCK))](
        x, x.stride(0), len(x), inputs, transposed, largest, batch, BLOCK=TRANSPOSE_BLOCK
    )
    means, clusters = _means(weight, x)
    grid = (tiles, plan.splits, batch // plan.tile_batch)
    gemm_kernel[grid](
        matrix.words, matrix.tiles, matrix.runs, matrix.chunks, matrix.order, matrix.scale_codes,
        matrix.scales, matrix.half_words, matrix.halves, matrix.units, matrix.top, matrix.row_of,
        matrix.factors, transposed, largest, len(x), batch, means, clusters,
        out if bias is None else bias, out, out.stride(0),
        work.take("partial", plan.splits * batch * tiles * matrix.rows, torch.float32),
        work.take("arrived", tiles * grid[2], torch.int32), plan.splits,
        MT=plan.tile_batch, ROWS=matrix.rows, DEPTHS=depth_set(matrix.depths),
        SPLIT=plan.splits > 1, HAS_MEANS=matrix.mean_codes is not None, HAS_BIAS=bias is not None,
        PTX=uses_ptx(weight.device), num_warps=1, num_stages=1,
    )  # fmt: skip


def _means(weight: GpuWeight, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(M, clusters) float32: what a cluster's means add to its outputs; unset without means."""
    matrix, clusters = weight.matrix, len(weight.matrix.runs)
    result = weight.workspace.take("means", len(x) * clusters, torch.float32)
    if matrix.mean_codes is not None:
        means_kernel[(clusters, len(x))](
            matrix.tiles, matrix.runs, matrix.chunks, matrix.order, matrix.scale_codes,
            matrix.mean_codes, matrix.scales, matrix.mean_steps,
            weight.index.first_tile_of_cluster, x, x.stride(0), result, clusters, WIDTH=WIDTH,
        )  # fmt: skip
    return result, clusters


def expand(weight: GpuWeight, out: torch.Tensor, natural: bool) -> torch.Tensor:
    """Write the weights to out (N, K), columns in their own order or sorted by depth."""
    matrix = weight.matrix
    mean_codes = matrix.scale_codes if matrix.mean_codes is None else matrix.mean_codes
    expand_kernel[(matrix.slots,)](
        matrix.words, matrix.tiles, matrix.runs, matrix.chunks, matrix.order, matrix.scale_codes,
        mean_codes, matrix.scales, matrix.mean_steps, matrix.exact, matrix.row_of,
        matrix.factors, weight.index.tile_of_slot, out, out.stride(0),
        ROWS=matrix.rows, DEPTHS=depth_set(matrix.depths),
        HAS_MEANS=matrix.mean_codes is not None, NATURAL=natural,
    )  # fmt: skip
    return out


def expand_and_multiply(
    weight: GpuWeight, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """out = x · Wᵀ + bias by the vendor's GEMM over a scratch that all matrices reuse."""
    outputs, inputs = weight.shape
    scratch = weight.workspace.take(f"dense {x.dtype}", outputs * inputs, x.dtype)
    dense = scratch[: outputs * inputs].view(outputs, inputs)
    # Sorted columns are contiguous where they are written; the input is cheaper to permute.
    natural = not weight.matrix.shared_order
    expand(weight, dense, natural)
    if not natural:
        x = x.index_select(1, weight.matrix.order[:inputs])
    if bias is None:
        return torch.mm(x, dense.t(), out=out)
    return torch.addmm(bias.to(x.dtype), x, dense.t(), out=out)


def rows(weight: GpuWeight, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Write rows ids (n,) of W to out (n, K)."""
    matrix = weight.matrix
    mean_codes = matrix.scale_codes if matrix.mean_codes is None else matrix.mean_codes
    longest = triton.cdiv(matrix.inputs, 32) + 9  # a cluster's chunks: each run has a short one
    rows_kernel[(len(ids), triton.cdiv(longest, ROW_CHUNKS))](
        matrix.words, matrix.tiles, matrix.runs, matrix.chunks, matrix.order, matrix.scale_codes,
        mean_codes, matrix.scales, matrix.mean_steps, matrix.exact, matrix.factors,
        places_on(weight.device), weight.index.place_of_row, ids, out, matrix.inputs,
        ROWS=matrix.rows, HAS_MEANS=matrix.mean_codes is not None, WIDTH=ROW_CHUNKS,
    )  # fmt: skip

"""Grids, scratch and arguments of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from cvxq_kernels.gpu.expand import expand_kernel, rows_kernel
from cvxq_kernels.gpu.gemm import gemm_kernel, sort_kernel
from cvxq_kernels.gpu.layout import ALL_DEPTHS, CHUNK, EIGHTHS, LOW_DEPTHS, MAX_DEPTH, PAIRS
from cvxq_kernels.gpu.matrix import BLOCK_WEIGHTS, DeviceMatrix
from cvxq_kernels.gpu.matvec import matvec_kernel
from cvxq_kernels.gpu.means import WIDTH, means_kernel
from cvxq_kernels.gpu.overlap import early
from cvxq_kernels.gpu.plan import Plan, gemm_warps
from cvxq_kernels.gpu.repack import places_on
from cvxq_kernels.gpu.shares import Shares
from cvxq_kernels.gpu.workspace import Workspace

SORT_BLOCK = 1024
SORTED_ORDERS = 4  # orders of columns at most for which inputs are sorted: of fused matrices
ROW_CHUNKS = 16  # chunks of a row that a program of `rows` reads


@dataclass(frozen=True, eq=False)
class Product:
    """What out (M, N) = x (M, K) · Wᵀ + bias is computed from and where it goes; bias (N,) or None.

    The rows of x and of out are contiguous.
    """

    x: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor

    def part(self, start: int, stop: int) -> Product:
        """The product for rows [start, stop) of x."""
        return Product(self.x[start:stop], self.bias, self.out[start:stop])


def uses_ptx(device: torch.device) -> bool:
    """Tell whether kernels on `device` may contain PTX: not in the interpreter, not on AMD."""
    return device.type == "cuda" and torch.version.hip is None


def depth_set(depths: int) -> int:
    """Round a set of depths (bit B for depth B) up to one that kernels are compiled for.

    A single depth, 1–4 or 1–8: few variants to compile, and loops over absent depths cost little.
    """
    depths &= ALL_DEPTHS
    if depths & (depths - 1) == 0:
        return depths
    return LOW_DEPTHS if depths <= LOW_DEPTHS else ALL_DEPTHS


def matvec(matrix: DeviceMatrix, work: Workspace, product: Product, plan: Plan) -> None:
    """Multiply with integer activations, M ≤ 8."""
    x, wide, shares = product.x, plan.kind == "matvec16", matrix.shares("matvec", plan.programs)
    rows = triton.next_power_of_2(len(x))
    depths, cells = depth_set(matrix.depths), rows * matrix.slots
    means = matrix.scale_codes if matrix.mean_codes is None else matrix.mean_codes
    matvec_kernel[(len(shares.items),)](
        **_product(matrix, work, product, shares, rows, 1),
        scale_words=matrix.scale_codes.view(torch.int64),
        mean_words=means.view(torch.int64),
        mean_steps=matrix.mean_steps,
        level_words=matrix.wide_words if wide else matrix.byte_words,
        exact=matrix.exact,
        x=x,
        x_stride=x.stride(0),
        acts8=work.take("acts8", (2 if wide else 1) * EIGHTHS * cells, torch.int64),
        acts32=work.take("acts32", PAIRS * cells if depths > LOW_DEPTHS else 1, torch.int64),
        steps=work.take("steps", cells, torch.float32),
        slots=matrix.slots,
        M=rows,
        DEPTHS=depths,
        UNROLL=plan.unroll,
        WIDE=wide,
        num_warps=1,
        **early(matrix.device),
    )


def gemm(matrix: DeviceMatrix, work: Workspace, product: Product, plan: Plan) -> None:
    """Multiply with float16 operands, M ≤ 256."""
    x, shares = product.x, matrix.shares("gemm", plan.programs)
    batch = max(triton.next_power_of_2(len(x)), plan.tile_batch)
    is_sorted = len(matrix.order) <= SORTED_ORDERS * matrix.inputs + CHUNK
    length = len(matrix.order) if is_sorted else matrix.inputs
    ordered = work.take("sorted", length * batch, torch.float16)
    largest = work.take("largest", batch, torch.float32)
    sort_kernel[(batch, triton.cdiv(length, SORT_BLOCK))](
        x=x,
        x_stride=x.stride(0),
        batch=len(x),
        columns=matrix.inputs,
        order=matrix.order,
        length=length,
        padded_batch=batch,
        out=ordered,
        largest=largest,
        SORTED=is_sorted,
        BLOCK=SORT_BLOCK,
    )
    blocks = batch // plan.tile_batch
    gemm_kernel[(len(shares.items), blocks)](
        **_product(matrix, work, product, shares, batch, blocks),
        scale_codes=matrix.scale_codes,
        half_words=matrix.half_words,
        halves=matrix.halves,
        top=matrix.top,
        x=ordered,
        largest=largest,
        padded_batch=batch,
        means=_means(matrix, work, x),
        clusters=len(matrix.runs),
        tile_count=len(matrix.tiles),
        MT=plan.tile_batch,
        DEPTHS=depth_set(matrix.depths),
        SORTED=is_sorted,
        num_warps=gemm_warps(matrix.rows, plan.tile_batch),
        num_stages=1,
    )


def _product(
    matrix: DeviceMatrix, work: Workspace, product: Product, shares: Shares, rows: int, blocks: int
) -> dict[str, Any]:
    """Arguments that the kernels of a product share.

    rows: of x that a tile's sums are kept for; blocks: programs of an item.
    """
    bias, out, items = product.bias, product.out, shares.items
    sums = len(items) * rows * matrix.rows if shares.is_split else 1
    return {
        "items": items,
        "words": matrix.words,
        "chunks": matrix.chunks,
        "order": matrix.order,
        "scales": matrix.scales,
        "units": matrix.units,
        "row_of": matrix.row_of,
        "factors": matrix.factors,
        "batch": len(product.x),
        "bias": out if bias is None else bias,
        "out": out,
        "out_stride": out.stride(0),
        "partial": work.take("partial", sums, torch.float32),
        "arrived": work.take("arrived", blocks * len(matrix.tiles), torch.int32),
        "ROWS": matrix.rows,
        "SPLIT": shares.is_split,
        "HAS_MEANS": matrix.mean_codes is not None,
        "HAS_BIAS": bias is not None,
        "PTX": uses_ptx(matrix.device),
    }


def _means(matrix: DeviceMatrix, work: Workspace, x: torch.Tensor) -> torch.Tensor:
    """(M, clusters) float32: what a cluster's means add to its outputs; unset without means."""
    clusters = len(matrix.runs)
    result = work.take("means", len(x) * clusters, torch.float32)
    if matrix.mean_codes is not None:
        means_kernel[(clusters, len(x))](
            tiles=matrix.tiles,
            runs=matrix.runs,
            chunks=matrix.chunks,
            order=matrix.order,
            scale_codes=matrix.scale_codes,
            mean_codes=matrix.mean_codes,
            scales=matrix.scales,
            mean_steps=matrix.mean_steps,
            first_tiles=matrix.first_tiles,
            x=x,
            x_stride=x.stride(0),
            out=result,
            clusters=clusters,
            WIDTH=WIDTH,
        )
    return result


def expand(matrix: DeviceMatrix, out: torch.Tensor, natural: bool) -> torch.Tensor:
    """Write the weights to out (N, K), columns in their own order or sorted by depth."""
    slots = 0, matrix.slots
    return _expand_slots(matrix, slots, matrix.row_of, 0, out, natural)


def _expand_slots(
    matrix: DeviceMatrix,
    slots: tuple[int, int],
    row_of: torch.Tensor,
    first_row: int,
    out: torch.Tensor,
    natural: bool,
) -> torch.Tensor:
    """Write the chunks in slots [first, last) to out at row_of (T·rows,) − first_row, if not −1."""
    first_slot, last_slot = slots
    expand_kernel[(last_slot - first_slot,)](
        **_exact(matrix),
        row_of=row_of,
        slot_tiles=matrix.slot_tiles,
        out=out,
        out_stride=out.stride(0),
        first_slot=first_slot,
        first_row=first_row,
        DEPTHS=depth_set(matrix.depths),
        NATURAL=natural,
    )
    return out


def expand_and_multiply(matrix: DeviceMatrix, work: Workspace, product: Product) -> torch.Tensor:
    """Multiply by the vendor's GEMM over a scratch that all matrices reuse; return `out`.

    A matrix of more than BLOCK_WEIGHTS is expanded and multiplied a block of tiles at a time.
    """
    x, bias, (outputs, inputs) = product.x, product.bias, matrix.shape
    # Sorted columns are contiguous where they are written; the input is cheaper to permute.
    natural = not matrix.shared_order
    if matrix.shared_order:
        x = x.index_select(1, matrix.order[:inputs])
    if outputs * inputs > BLOCK_WEIGHTS:
        return _multiply_blocks(matrix, work, Product(x, bias, product.out), natural)
    scratch = work.take(f"dense {x.dtype}", outputs * inputs, x.dtype)
    dense = scratch[: outputs * inputs].view(outputs, inputs)
    expand(matrix, dense, natural)
    if bias is None:
        return torch.mm(x, dense.t(), out=product.out)
    return torch.addmm(bias.to(x.dtype), x, dense.t(), out=product.out)


def _multiply_blocks(
    matrix: DeviceMatrix, work: Workspace, product: Product, natural: bool
) -> torch.Tensor:
    """Multiply by one block of expanded weights after the other; columns of x are as expanded."""
    x, bias, out = product.x, product.bias, product.out
    for block in matrix.blocks:
        first_row, last_row = block.first_tile * matrix.rows, block.last_tile * matrix.rows
        size = (last_row - first_row) * matrix.inputs
        dense = work.take(f"dense {x.dtype}", size, x.dtype)[:size].view(-1, matrix.inputs)
        slots = block.first_slot, block.last_slot
        _expand_slots(matrix, slots, matrix.stored_place, first_row, dense, natural)
        found = torch.mm(x, dense.t())
        out.index_copy_(1, block.outputs, found.index_select(1, block.places))
    return out if bias is None else out.add_(bias)


def rows(matrix: DeviceMatrix, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Write rows ids (n,) of W to out (n, K)."""
    # A cluster's chunks, at most: each run has a short one.
    longest = triton.cdiv(matrix.inputs, CHUNK) + MAX_DEPTH + 1
    rows_kernel[(len(ids), triton.cdiv(longest, ROW_CHUNKS))](
        **_exact(matrix),
        places=places_on(matrix.device),
        place_of_row=matrix.place_of_row,
        ids=ids,
        out=out,
        columns=matrix.inputs,
        WIDTH=ROW_CHUNKS,
    )


def _exact(matrix: DeviceMatrix) -> dict[str, Any]:
    """Arguments that the kernels share which decode to the bit."""
    mean_codes = matrix.scale_codes if matrix.mean_codes is None else matrix.mean_codes
    return {
        "words": matrix.words,
        "tiles": matrix.tiles,
        "runs": matrix.runs,
        "chunks": matrix.chunks,
        "order": matrix.order,
        "scales": matrix.scales,
        "factors": matrix.factors,
        "ROWS": matrix.rows,
        "HAS_MEANS": matrix.mean_codes is not None,
        "scale_codes": matrix.scale_codes,
        "mean_codes": mean_codes,
        "mean_steps": matrix.mean_steps,
        "levels": matrix.exact,
    }

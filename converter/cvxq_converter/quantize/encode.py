"""Plans and a budget → packed tensors and the codebook that reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from cvxq_format import Codebook, CompandedTensor, pack_codes, payload_size
from cvxq_format.codebook import DEPTHS, codebook_size, depth_mask

from cvxq_converter.allocate.allocation import (
    MODEL_THRESHOLDS,
    BitAllocation,
    measured_thresholds,
)
from cvxq_converter.allocate.plan import MatrixPlan
from cvxq_converter.allocate.scale_width import choose_scale_bits
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.columns import InverseFactor, QuantizedMatrix, quantize_matrix
from cvxq_converter.quantize.companding import (
    MAX_DEPTH,
    LevelHistogram,
    default_levels,
    distortions,
    fit_levels,
    make_codebook,
)

WEIGHTS_PER_LEVEL = 16  # that a depth needs for tables of its own
FITTED_SAVES = 0.2  # bits per weight, by levels fitted to the weights instead of the compander's
WeightOf = Callable[[MatrixPlan], torch.Tensor]
FactorOf = Callable[[str], InverseFactor | None]


@dataclass(frozen=True)
class Encoded:
    """All quantized matrices of a model, in the order of the plans.

    energies, projections: per matrix (9,) float64 Σ w² and Σ w·wq by bit depth.
    """

    tensors: list[CompandedTensor]
    codebook: Codebook
    energies: list[np.ndarray]
    projections: list[np.ndarray]


def overhead_bytes(plan: MatrixPlan, options: ConversionOptions, scale_bits: int) -> int:
    """Bytes of one matrix in the file apart from its codes."""
    clustering = plan.clustering
    columns = plan.moments[0].shape[1]
    return payload_size(
        tuple(plan.matrix.weight.shape),
        options.group_size,
        clustering.partitions,
        np.zeros((1, clustering.clusters, columns), dtype=np.uint8),
        scale_bits=scale_bits,
        column_bits=plan.worths.column_bits,
        means=plan.with_means,
        permuted=clustering.is_permuted,
        cluster_map=clustering.is_permuted,
        row_scale_bits=plan.row_scales.bits,
        separable=options.separable_depths,
    )


def default_codebook(
    thresholds: np.ndarray, scale_bits: int, stored_depths: tuple[int, ...]
) -> Codebook:
    """The compander's levels with the thresholds and scales of a conversion."""
    return make_codebook(default_levels(), thresholds, scale_bits, stored_depths)


def codebook_bytes(scale_bits: int, stored_depths: tuple[int, ...]) -> int:
    """Bytes of the one codebook that a converted file holds, with the tables of these depths."""
    return codebook_size(scale_bits, depth_mask(stored_depths))


def allocate_with_tables(
    plans: Sequence[MatrixPlan], allocate: Callable[[tuple[int, ...]], BitAllocation]
) -> BitAllocation:
    """Allocate, once with all level tables in the file, then with those that pay.

    allocate: takes the depths whose tables the file holds, as in `BitAllocation.stored_depths`. A
    table of 2^B numbers pays if the weights of depth B save more by it than it takes; the others
    use the compander's levels.
    """
    first = allocate(DEPTHS)
    weights = np.zeros(MAX_DEPTH + 1)
    for plan, depths in zip(plans, first.depths, strict=True):
        rows = np.broadcast_to(plan.clustering.cluster_rows[:, None], depths.shape)
        weights += np.bincount(depths.ravel(), rows.ravel(), minlength=MAX_DEPTH + 1)
    pays = tuple(d for d in DEPTHS if weights[d] * FITTED_SAVES > 32 << d)
    return replace(allocate(pays), stored_depths=pays)


def empty_tensor(plan: MatrixPlan, options: ConversionOptions, scale_bits: int) -> CompandedTensor:
    """A tensor with the plan's side information, all its groups at depth 0: for sizes only."""
    clusters, columns = plan.moments[0].shape
    zeros = np.zeros((clusters, columns), dtype=np.uint8)
    matrix = QuantizedMatrix(
        clustering=plan.clustering,
        depths=zeros,
        codes=np.zeros(plan.matrix.weight.shape, dtype=np.uint8),
        scale_codes=zeros,
        mean_codes=zeros.astype(np.int8) if plan.with_means else None,
        scale_unit=np.float32(0),
        mean_step=np.float32(0),
        squared_error=np.zeros(9),
        energy=np.zeros(9),
        projection=np.zeros(9),
    )
    lowest = None
    if plan.worths.cluster_terms is not None:
        lowest = plan.worths.cluster_terms - np.iinfo(np.int16).min
    return _pack(plan, matrix, lowest, options, scale_bits)


def depth_thresholds(
    plans: Sequence[MatrixPlan], weight_of: WeightOf, options: ConversionOptions
) -> np.ndarray:
    """(8,) int32 worths, in 1/256 bit, at which the depths 1 to 8 begin."""
    if options.curve == "model":
        return MODEL_THRESHOLDS
    pooled = _pooled_histogram(plans, weight_of)
    tables = [fit_levels(pooled, depth) for depth in range(1, MAX_DEPTH + 1)]
    return measured_thresholds(distortions(pooled, tables))


def encode_matrices(
    plans: Sequence[MatrixPlan],
    weight_of: WeightOf,
    allocation: BitAllocation,
    thresholds: np.ndarray,
    options: ConversionOptions,
    progress: Callable[[int, int], None],
    factor_of: FactorOf,
) -> Encoded:
    """Fit the levels to the allocated depths, then quantize.

    weight_of: returns the original weight (N, K) of a plan's matrix. factor_of: by matrix name,
    what error feedback needs; None where it is not to be used.
    """
    total = (2 if options.levels == "fitted" else 1) * len(plans)
    levels = default_levels()
    if options.levels == "fitted":
        fitted = _fit_tables(plans, allocation, weight_of, lambda i: progress(i, total))
        levels = tuple((fitted if d in allocation.stored_depths else levels)[d - 1] for d in DEPTHS)
    scale_bits = choose_scale_bits(plans)
    codebook = make_codebook(levels, thresholds, scale_bits, allocation.stored_depths)
    tensors, energies, projections = [], [], []
    for i, plan in enumerate(plans):
        matrix = quantize_matrix(
            plan.row_scales.normalize(weight_of(plan)),
            plan.clustering,
            allocation.depths[i],
            codebook,
            with_means=plan.with_means,
            refine=options.refine_scales,
            moments=plan.moments,
            row_weights=plan.row_weights,
            feedback=factor_of(plan.matrix.name),
        )
        offsets = allocation.cluster_offsets[i]
        tensors.append(_pack(plan, matrix, offsets, options, scale_bits))
        energies.append(matrix.energy)
        projections.append(matrix.projection)
        progress(total - len(plans) + i + 1, total)
    return Encoded(tensors, codebook, energies, projections)


def _fit_tables(
    plans: Sequence[MatrixPlan],
    allocation: BitAllocation,
    weight_of: WeightOf,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, ...]:
    histograms = {depth: LevelHistogram.empty() for depth in range(1, MAX_DEPTH + 1)}
    for i, plan in enumerate(plans):
        weight = plan.row_scales.normalize(weight_of(plan))
        _add_to_histograms(histograms, weight, plan, allocation.depths[i])
        progress(i + 1)
    everything = LevelHistogram(np.sum([h.counts for h in histograms.values()], axis=0))
    return tuple(
        fit_levels(h if h.counts.sum() > WEIGHTS_PER_LEVEL << depth else everything, depth)
        for depth, h in histograms.items()
    )


def _pooled_histogram(plans: Sequence[MatrixPlan], weight_of: WeightOf) -> LevelHistogram:
    histograms = {0: LevelHistogram.empty()}
    for plan in plans:
        depths = np.zeros(plan.moments[0].shape, dtype=np.uint8)
        weight = plan.row_scales.normalize(weight_of(plan))
        _add_to_histograms(histograms, weight, plan, depths)
    return histograms[0]


def _pack(
    plan: MatrixPlan,
    matrix: QuantizedMatrix,
    offsets: np.ndarray | None,
    options: ConversionOptions,
    scale_bits: int,
) -> CompandedTensor:
    clustering, worths = plan.clustering, plan.worths
    cluster_terms = None
    if worths.cluster_terms is not None and offsets is not None:
        # Beyond this range every group of the cluster is pruned, or at depth 8, either way.
        limit = np.iinfo(np.int16)
        cluster_terms = np.clip(worths.cluster_terms - offsets, limit.min, limit.max)
    return CompandedTensor(
        shape=tuple(plan.matrix.weight.shape),
        group_size=options.group_size,
        partitions=clustering.partitions,
        transposed=False,
        source_orientation=plan.matrix.source_orientation,
        codebook=0,
        scale_unit=matrix.scale_unit,
        mean_step=matrix.mean_step,
        depths=matrix.depths[None],
        column_terms=None if worths.column_terms is None else worths.column_terms[None],
        cluster_terms=None if cluster_terms is None else cluster_terms.astype(np.int16)[None],
        column_bits=worths.column_bits,
        column_shift=worths.column_shift,
        scale_codes=matrix.scale_codes[None],
        scale_bits=scale_bits,
        mean_codes=None if matrix.mean_codes is None else matrix.mean_codes[None],
        permutation=clustering.permutation[None] if clustering.is_permuted else None,
        cluster_map=clustering.is_permuted,
        row_scale_codes=plan.row_scales.codes[None] if plan.row_scales.bits else None,
        row_scale_bits=plan.row_scales.bits,
        packed_codes=pack_codes(
            matrix.codes[None], matrix.depths[None], options.group_size, clustering.partitions
        ),
    )


def _add_to_histograms(
    histograms: dict[int, LevelHistogram],
    weight: torch.Tensor,
    plan: MatrixPlan,
    depths: np.ndarray,
) -> None:
    """Pool the weights of one matrix, each in units of its group's deviation, by bit depth.

    weight: (N, K), rows normalized; depths: (C, K).
    """
    clustering = plan.clustering
    permutation = torch.from_numpy(clustering.permutation).to(weight.device)
    deviation = plan.deviation()
    for c in range(clustering.clusters):
        span = slice(int(clustering.bounds[c]), int(clustering.bounds[c + 1]))
        rows = permutation[span]
        weights = torch.from_numpy(plan.row_weights[span]).to(weight.device)
        block = weight[rows].float()
        if plan.with_means:
            block = block - plan.moments[0][c].float()
        normalized = block / deviation[c].clamp_min(1e-38)
        for depth, histogram in histograms.items():
            chosen = torch.from_numpy(depths[c] == depth).to(weight.device)
            used = chosen & (deviation[c] > 0)
            if bool(used.any()):
                histogram.add(normalized[:, used], weights)

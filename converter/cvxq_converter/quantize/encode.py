"""Plans and a budget → packed tensors and the codebook that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from cvxq_format import Codebook, CompandedTensor, pack_codes
from cvxq_format.codebook import DEPTHS

from cvxq_converter.allocate.allocation import BitAllocation
from cvxq_converter.allocate.plan import MatrixPlan
from cvxq_converter.allocate.scale_width import choose_scale_bits
from cvxq_converter.journal import Journal
from cvxq_converter.measure.hessian import Feedback
from cvxq_converter.options import Method
from cvxq_converter.quantize.columns import (
    SIDE_BY_SIDE,
    QuantizedMatrix,
    Task,
    quantize_matrices,
    runs_fused,
)
from cvxq_converter.quantize.companding import (
    LevelHistogram,
    default_levels,
    fit_levels,
    make_codebook,
)
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.scratch import Scratch
from cvxq_converter.stages import Done

WEIGHTS_PER_LEVEL = 16  # that a depth needs for tables of its own
_Made = tuple[CompandedTensor, np.ndarray, np.ndarray]  # with energy and projection


@dataclass(frozen=True)
class Encoded:
    """All quantized matrices of a model, in the order of the plans.

    energies, projections: per matrix (9,) float64 Σ w² and Σ w·wq by bit depth.
    """

    tensors: list[CompandedTensor]
    codebook: Codebook
    energies: list[np.ndarray]
    projections: list[np.ndarray]


def encode_matrices(
    loaded: LoadedModel,
    plans: Sequence[MatrixPlan],
    allocation: BitAllocation,
    method: Method,
    progress: Done,
    feedback: Feedback | None,
    journal: Journal,
) -> Encoded:
    """Fit the levels to the allocated depths, then quantize the original weights.

    feedback: what pushing errors on needs; None where it is not to be used.
    """
    is_fitted = method.levels == "fitted"
    total = (1 + is_fitted) * len(plans)
    levels = default_levels()
    if is_fitted:
        fitted = journal.step(
            "levels",
            lambda: _fit_tables(loaded, plans, allocation, lambda i: progress(i, total)),
        )
        levels = tuple((fitted if d in allocation.stored_depths else levels)[d - 1] for d in DEPTHS)
    scale_bits = choose_scale_bits(plans)
    codebook = make_codebook(levels, scale_bits, allocation.stored_depths)

    def encode(batch: Sequence[int]) -> list[_Made]:
        tasks = [
            Task(
                plans[i].row_scales.normalize(loaded.originals[plans[i].matrix.name]),
                plans[i].clustering,
                allocation.depths[i],
                plans[i].moments,
                plans[i].row_weights,
                plans[i].with_means,
                feedback.factor(plans[i].matrix.name) if feedback else None,
            )
            for i in batch
        ]
        encoded: list[_Made] = []
        found = quantize_matrices(tasks, codebook, method.refine_scales)
        for i, matrix in zip(batch, found, strict=True):
            offsets, scratch = allocation.cluster_offsets[i], loaded.streamed.scratch
            packed = _pack(plans[i], matrix, offsets, scale_bits, scratch)
            encoded.append((packed, matrix.energy, matrix.projection))
        return encoded

    batches = _side_by_side(plans, feedback)
    names = [[plans[i].matrix.name for i in batch] for batch in batches]
    steps = [f"codes.{len(batch)}.{batch[0]}" for batch in names]
    made: dict[int, _Made] = {}

    def report(before: int, done: int, _: int) -> None:
        progress(total - len(plans) + len(plans) * (before + done) // len(batches), total)

    before = 0
    for part in _by_factors(names, steps, feedback, journal):
        part_steps, ways = [steps[b] for b in part], [partial(encode, batches[b]) for b in part]
        found = journal.each(part_steps, ways, partial(report, before))
        for b, encoded in zip(part, found, strict=True):
            made.update(zip(batches[b], encoded, strict=True))
            if feedback:
                feedback.release(names[b])
        before += len(part)
    tensors, energies, projections = map(list, zip(*(made[i] for i in sorted(made)), strict=True))
    return Encoded(tensors, codebook, energies, projections)


def _by_factors(
    names: Sequence[Sequence[str]],
    steps: Sequence[str],
    feedback: Feedback | None,
    journal: Journal,
) -> Iterator[list[int]]:
    """Yield the numbers of the batches whose factors are there by then, part by part.

    names: of the matrices of each batch. steps: what their codes are kept as.
    """
    parts = feedback.parts if feedback else []
    lacking = set(journal.lacking(steps))
    wanted = {n for batch, step in zip(names, steps, strict=True) if step in lacking for n in batch}
    missing = {name for part in parts for name in part}
    left = [*range(len(names))]
    for part in [[], *parts]:
        if feedback and part:
            feedback.prepare(name for name in part if name in wanted)
        missing.difference_update(part)
        ready = [b for b in left if missing.isdisjoint(names[b])]
        left = [b for b in left if b not in ready]
        yield ready


def _side_by_side(plans: Sequence[MatrixPlan], feedback: Feedback | None) -> list[list[int]]:
    """The numbers of the matrices that are quantized together, those of equal width.

    Only with feedback, and without means, whose steps are one for all; and not where one kernel
    does a whole block.
    """
    batches: list[list[int]] = []
    open_batches: dict[int, tuple[list[int], int]] = {}  # by width, and their weights
    for i, plan in enumerate(plans):
        N, K = plan.matrix.weight.shape
        is_alone = plan.with_means or runs_fused(plan.matrix.parameter.device)
        if is_alone or feedback is None or not feedback.knows(plan.matrix.name):
            batches.append([i])
            continue
        batch, weights = open_batches.get(K, ([], SIDE_BY_SIDE))
        if weights + N * K > SIDE_BY_SIDE:
            batch, weights = [], 0
            batches.append(batch)
        batch.append(i)
        open_batches[K] = batch, weights + N * K
    return batches


def _fit_tables(
    loaded: LoadedModel,
    plans: Sequence[MatrixPlan],
    allocation: BitAllocation,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, ...]:
    """Levels of every depth, fitted to the weights that were given it, or to all where few were."""
    histograms = {depth: LevelHistogram.empty() for depth in DEPTHS}
    for i, plan in enumerate(plans):
        weight = plan.row_scales.normalize(loaded.originals[plan.matrix.name])
        _add_to_histograms(histograms, weight, plan, allocation.depths[i])
        progress(i + 1)
    everything = LevelHistogram(np.sum([h.counts for h in histograms.values()], axis=0))
    return tuple(
        fit_levels(h if h.counts.sum() > WEIGHTS_PER_LEVEL << depth else everything, depth)
        for depth, h in histograms.items()
    )


def _pack(
    plan: MatrixPlan,
    matrix: QuantizedMatrix,
    offsets: np.ndarray,
    scale_bits: int,
    scratch: Scratch,
) -> CompandedTensor:
    clustering, worths = plan.clustering, plan.worths
    cluster_terms = None
    if worths.cluster_terms is not None:
        # Beyond this range every group of the cluster is pruned, or at depth 8, either way.
        limit = np.iinfo(np.int16)
        cluster_terms = np.clip(worths.cluster_terms - offsets, limit.min, limit.max)
    packed = pack_codes(
        matrix.codes[None], matrix.depths[None], clustering.group_size, clustering.partitions
    )
    return CompandedTensor(
        shape=tuple(plan.matrix.weight.shape),
        group_size=clustering.group_size,
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
        packed_codes=scratch.copy(torch.from_numpy(packed)).numpy(),
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

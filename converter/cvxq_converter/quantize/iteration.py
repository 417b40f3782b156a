"""One iteration of a conversion: sensitivities → depths → codes → corrections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from cvxq_format import Codebook, CompandedTensor

from cvxq_converter.allocate.allocation import BitAllocation
from cvxq_converter.allocate.bias import BIAS_BITS
from cvxq_converter.allocate.plan import MatrixPlan, Sensitivity, plan_matrix
from cvxq_converter.allocate.scale_width import choose_scale_bits
from cvxq_converter.allocate.sizes import allocate_for_rate, allocate_for_size, empty_file_header
from cvxq_converter.measure.hessian import Feedback
from cvxq_converter.measure.quality import Divergence, Reference
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.correction import Statistics, correct, layers_to_gain_bias
from cvxq_converter.quantize.encode import (
    allocate_with_tables,
    codebook_bytes,
    default_codebook,
    depth_thresholds,
    empty_tensor,
    encode_matrices,
    overhead_bytes,
)
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Stages


@dataclass(frozen=True)
class Quantized:
    """The quantized matrices of a model, and what was decided on the way."""

    tensors: dict[str, CompandedTensor]
    codebook: Codebook
    added_biases: dict[str, torch.Tensor] = field(default_factory=dict)
    allocation: BitAllocation | None = None
    gain_exponent: float | None = None
    quality: Divergence | None = None


WriteEmpty = Callable[[Path, Quantized], None]


@torch.no_grad()
def quantize_network(
    loaded: LoadedModel,
    statistics: Statistics,
    reference: Reference | None,
    options: ConversionOptions,
    stages: Stages,
    write_empty: WriteEmpty,
    group_sensitivities: Mapping[str, np.ndarray] | None = None,
    feedback: Feedback | None = None,
) -> Quantized:
    """Quantize the original weights, once measured; leaves the result in the network.

    statistics: by matrix name, empty for sensitivity 1 everywhere. reference: of the original, for
    the choice of the gain and the loss that is reported; None leaves the network as it was.
    group_sensitivities: by matrix name (C, K), from `measure_groups`, in place of rows × columns.
    feedback: of the same statistics; None quantizes every group on its own.
    write_empty: writes the file of a result whose groups all have depth 0, to learn its size.
    """

    def weight_of(plan: MatrixPlan) -> torch.Tensor:
        return loaded.originals[plan.matrix.name]

    gained = layers_to_gain_bias(loaded, statistics, options)
    feedback = feedback if options.feedback else None
    foreseen = statistics
    if feedback:
        with stages.stage("hessians") as done:
            foreseen = feedback.foresee(statistics, done)
    with stages.stage("allocate") as done:
        plans = []
        for i, matrix in enumerate(loaded.matrices):
            groups = (group_sensitivities or {}).get(matrix.name)
            plans.append(make_plan(loaded, matrix, foreseen, options, groups))
            done(i + 1, len(loaded.matrices))
        thresholds = depth_thresholds(plans, weight_of, options)
        allocation = _allocate(loaded, plans, thresholds, gained, options, write_empty)
    with stages.stage("quantize") as done:
        factor_of = feedback.factor if feedback else lambda _: None
        encoded = encode_matrices(
            plans, weight_of, allocation, thresholds, options, done, factor_of
        )
    with stages.stage("correct") as done:
        result = correct(loaded, encoded, statistics, gained, reference, options, done)
    return Quantized(
        tensors={m.name: t for m, t in zip(loaded.matrices, encoded.tensors, strict=True)},
        codebook=result.codebook,
        added_biases=result.added_biases,
        allocation=allocation,
        gain_exponent=result.gain_exponent,
        quality=result.quality,
    )


def make_plan(
    loaded: LoadedModel,
    matrix: Matrix,
    statistics: Statistics,
    options: ConversionOptions,
    group_sensitivity: np.ndarray | None = None,
) -> MatrixPlan:
    """Cut one matrix into groups and find their worths; sensitivity 1 without statistics."""
    weight = loaded.originals[matrix.name]
    stats = statistics.get(matrix.name)
    if stats is not None:
        sensitivity = Sensitivity.from_statistics(stats)
    else:
        sensitivity = Sensitivity.uniform((weight.shape[0], weight.shape[1]))
    return plan_matrix(
        matrix,
        weight,
        sensitivity,
        group_sensitivity=group_sensitivity,
        group_size=options.group_size,
        partitions=options.partitions,
        uniform=options.uniform_depths,
        separable=options.separable_depths,
        means=options.means,
        input_power=None if stats is None else stats.input_second_moment,
    )


def _allocate(
    loaded: LoadedModel,
    plans: list[MatrixPlan],
    thresholds: np.ndarray,
    gained: list[Matrix],
    options: ConversionOptions,
    write_empty: WriteEmpty,
) -> BitAllocation:
    worths = [p.bounded_worths(options.largest_error, thresholds) for p in plans]
    scale_bits = choose_scale_bits(plans)
    side = {p.matrix.name: overhead_bytes(p, options, scale_bits) for p in plans}

    def allocate(stored_depths: tuple[int, ...]) -> BitAllocation:
        if options.bits is not None:
            bias_bytes = sum(m.weight.shape[0] * BIAS_BITS // 8 for m in gained)
            codebook = codebook_bytes(scale_bits, stored_depths)
            side_bytes = sum(side.values()) + codebook + bias_bytes
            return allocate_for_rate(
                worths, thresholds, options.bits, loaded.quantized_weights, side_bytes
            )
        assert options.size_bytes is not None
        empty = empty_result(plans, thresholds, stored_depths, gained, options)
        header = empty_file_header(lambda path: write_empty(path, empty))
        return allocate_for_size(worths, thresholds, options.size_bytes, header, side)

    return allocate_with_tables(plans, allocate)


def empty_result(
    plans: Sequence[MatrixPlan],
    thresholds: np.ndarray,
    stored_depths: tuple[int, ...],
    gained: Sequence[Matrix],
    options: ConversionOptions,
) -> Quantized:
    """A result whose groups all have depth 0: for sizes only."""
    scale_bits = choose_scale_bits(plans)
    return Quantized(
        tensors={p.matrix.name: empty_tensor(p, options, scale_bits) for p in plans},
        codebook=default_codebook(thresholds, scale_bits, stored_depths),
        added_biases={m.bias_name: torch.zeros(len(m.weight)) for m in gained if m.bias_name},
    )

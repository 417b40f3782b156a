"""After the codes are fixed: quantized weights into the network, biases corrected, gain set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from cvxq_format import Codebook, CompandedTensor, dequantize

from cvxq_converter.allocate.bias import output_shift
from cvxq_converter.measure.quality import Divergence, Reference, divergence
from cvxq_converter.measure.sums import Statistics
from cvxq_converter.options import Method
from cvxq_converter.quantize.encode import Encoded
from cvxq_converter.quantize.gain import EXPONENTS, FALLBACK_EXPONENT, shrinkage_ratios, with_gain
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Done


@dataclass(frozen=True)
class Corrected:
    """The codebook with its gain, the biases that layers gained, and the loss that remains."""

    codebook: Codebook
    gain_exponent: float
    added_biases: dict[str, torch.Tensor]
    quality: Divergence | None


def correct(
    loaded: LoadedModel,
    encoded: Encoded,
    statistics: Statistics,
    gained: list[Matrix],
    reference: Reference | None,
    method: Method,
    progress: Done,
) -> Corrected:
    """Choose the gain by KL, and leave the corrected quantized weights in the network.

    Without a reference nothing is installed and the gain takes its fallback.
    """
    tensors = {m.name: t for m, t in zip(loaded.matrices, encoded.tensors, strict=True)}
    ratios = shrinkage_ratios(encoded.energies, encoded.projections)
    if reference is None:
        exponent = FALLBACK_EXPONENT if method.gain is None else method.gain
        return Corrected(with_gain(encoded.codebook, ratios, exponent), exponent, {}, None)

    def attempt(exponent: float) -> Corrected:
        codebook = with_gain(encoded.codebook, ratios, exponent)
        added = install(loaded, tensors, codebook, statistics, gained, method)
        return Corrected(codebook, exponent, added, divergence(loaded.network, reference))

    exponents = EXPONENTS if method.gain is None else (method.gain,)
    tried = []
    for i, exponent in enumerate(exponents):
        tried.append(attempt(exponent))
        progress(i + 1, len(exponents))
    best = min(tried, key=lambda c: (c.quality.mean if c.quality else 0.0, c.gain_exponent))
    if best is not tried[-1]:
        install(loaded, tensors, best.codebook, statistics, gained, method)
    return best


def install(
    loaded: LoadedModel,
    tensors: Mapping[str, CompandedTensor],
    codebook: Codebook,
    statistics: Statistics,
    gained: list[Matrix],
    method: Method,
) -> dict[str, torch.Tensor]:
    """Put the dequantized weights and corrected biases into the network.

    Returns the biases that layers without one gained, by tensor name.
    """
    loaded.restore_biases()  # the weights are all replaced below
    added: dict[str, torch.Tensor] = {}
    gaining = {m.name for m in gained}
    for matrix in loaded.matrices:
        original = loaded.originals[matrix.name]
        dense = torch.from_numpy(dequantize(tensors[matrix.name], codebook))
        quantized = dense.to(original.device)
        loaded.install(matrix, quantized)
        stats = statistics.get(matrix.name)
        if not method.correct_biases or stats is None or stats.input_mean is None:
            continue
        if not matrix.has_bias and matrix.name not in gaining:
            continue
        before = loaded.original_biases.get(matrix.name, torch.zeros(len(original)))
        shift = output_shift(original, quantized, stats.input_mean)
        corrected = to_16_bits(before.to(shift) - shift)
        loaded.set_bias(matrix, corrected)
        if matrix.name in gaining:
            assert matrix.bias_name is not None
            added[matrix.bias_name] = corrected
    return added


def to_16_bits(value: torch.Tensor) -> torch.Tensor:
    """Round to what the file stores: float16, or bfloat16 if that would overflow."""
    half = value.half()
    return (half if bool(half.isfinite().all()) else value.bfloat16()).float()

"""After the codes are fixed: quantized weights into the network, biases corrected, gain set."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from cvxq_format import Codebook, CompandedTensor, dequantize

from cvxq_converter.allocate.bias import output_shift
from cvxq_converter.journal import Journal
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
    journal: Journal,
) -> Corrected:
    """Choose the gain by KL, and leave the corrected quantized weights in the network.

    Without a reference nothing is installed and the gain takes its fallback.
    """
    tensors = {m.name: t for m, t in zip(loaded.matrices, encoded.tensors, strict=True)}
    ratios = shrinkage_ratios(encoded.energies, encoded.projections)
    if reference is None:
        exponent = FALLBACK_EXPONENT if method.gain is None else method.gain
        return Corrected(with_gain(encoded.codebook, ratios, exponent), exponent, {}, None)

    def attempt(exponent: float) -> tuple[Divergence, dict[str, torch.Tensor]]:
        replacement = of_gain(exponent)
        replacement.install()
        return divergence(loaded.streamed, reference), replacement.biases

    def of_gain(exponent: float) -> Replacement:
        codebook = with_gain(encoded.codebook, ratios, exponent)
        return Replacement(loaded, tensors, codebook, statistics, gained, method)

    exponents = EXPONENTS if method.gain is None else (method.gain,)
    tries = journal.each(
        [f"gain.{exponent}" for exponent in exponents],
        [partial(attempt, exponent) for exponent in exponents],
        progress,
    )
    found = zip(tries, exponents, strict=True)
    (quality, biases), best = min(found, key=lambda item: (item[0][0].mean, item[1]))
    replacement = of_gain(best)
    replacement.biases = biases
    replacement.install()
    return Corrected(replacement.codebook, best, replacement.added(), quality)


class Replacement:
    """Dequantized weights in place of the originals, and biases that make up for their mean error.

    A weight is made whenever it is needed, its bias when it is needed first.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tensors: Mapping[str, CompandedTensor],
        codebook: Codebook,
        statistics: Statistics,
        gained: Collection[Matrix],
        method: Method,
    ) -> None:
        self._loaded, self._tensors, self.codebook = loaded, tensors, codebook
        self._statistics, self._method = statistics, method
        self._gaining = {matrix.name for matrix in gained}
        self.biases: dict[str, torch.Tensor] = {}  # corrected so far, by matrix name

    def install(self) -> None:
        """Let the network have these weights and biases from now on."""
        self._loaded.restore_biases()
        for matrix in self._loaded.matrices:
            if matrix.name in self.biases:
                self._loaded.set_bias(matrix, self.biases[matrix.name])
        self._loaded.replace(self.weight)

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The dequantized weight (N, K) of a matrix; sets its bias the first time."""
        dense = torch.from_numpy(dequantize(self._tensors[matrix.name], self.codebook))
        dense = dense.to(matrix.parameter.device)
        if matrix.name not in self.biases and self._corrects(matrix):
            self.biases[matrix.name] = self._corrected_bias(matrix, dense)
            self._loaded.set_bias(matrix, self.biases[matrix.name])
        return dense

    def added(self) -> dict[str, torch.Tensor]:
        """The biases that layers without one gained, by tensor name; all weights were needed."""
        return {
            matrix.bias_name: self.biases[matrix.name]
            for matrix in self._loaded.matrices
            if matrix.name in self._gaining
            and matrix.name in self.biases
            and matrix.bias_name is not None
        }

    def _corrects(self, matrix: Matrix) -> bool:
        stats = self._statistics.get(matrix.name)
        is_known = self._method.correct_biases and stats is not None
        has_input = is_known and stats is not None and stats.input_mean is not None
        return has_input and (matrix.has_bias or matrix.name in self._gaining)

    def _corrected_bias(self, matrix: Matrix, quantized: torch.Tensor) -> torch.Tensor:
        input_mean = self._statistics[matrix.name].input_mean
        assert input_mean is not None
        original = self._loaded.originals[matrix.name]
        before = self._loaded.original_biases.get(matrix.name, torch.zeros(len(original)))
        shift = output_shift(original, quantized, input_mean)
        return to_16_bits(before.to(shift) - shift)


def to_16_bits(value: torch.Tensor) -> torch.Tensor:
    """Round to what the file stores: float16, or bfloat16 if that would overflow."""
    half = value.half()
    return (half if bool(half.isfinite().all()) else value.bfloat16()).float()

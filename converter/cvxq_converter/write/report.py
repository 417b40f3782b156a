"""What a conversion did: the closing table, `--report`, and the part of it kept in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from cvxq_format import CompandedTensor, depth_histogram
from cvxq_format.limits import MAX_DEPTH

from cvxq_converter.allocate.target import TargetResult
from cvxq_converter.write.details import Details

MOST_REASON = 160  # characters


@dataclass(frozen=True)
class DecoderReport:
    """Whether the file's record was proved to compute what the network does; if not, why not."""

    is_proved: bool
    reason: str | None = None

    def line(self) -> str:
        """How the file will be run, in one line."""
        if self.is_proved:
            return "by its own decoders, proved against transformers"
        return f"through transformers: {self.reason}"


@dataclass(frozen=True)
class ConversionReport:
    """Rates, sizes and losses of one conversion.

    rate_bits_per_weight: of the quantized matrices, all their side information included.
    side_bits_per_weight: the part of it that is not codes.
    file_bytes: of the whole file, known once it is written.
    depth_histogram: share of the quantized weights at bit depth 0 … 8.
    kl, kl_standard_error: nats per token to the original, on held-back calibration sequences;
        None without calibration. perplexity_increase: relative, on the same; 0.01 is 1 %.
    target: the loss that was asked for and the one achieved, where the rate was sought.
    decoder: which path runs the file.
    stage_seconds: wall-clock time per stage. details: on request, for the report's page. Neither
        is ever written into the file.
    """

    method: str
    rate_bits_per_weight: float
    side_bits_per_weight: float
    parameters: int
    quantized_weights: int
    matrices: int
    depth_histogram: tuple[float, ...]
    gained_biases: int
    gain_exponent: float | None
    dual_variable: float | None
    ascent_steps: int | None
    kl: float | None
    kl_standard_error: float | None
    perplexity_increase: float | None
    calibration_tokens: int
    decoder: DecoderReport
    target: TargetResult | None = None
    file_bytes: int = 0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    details: Details | None = None

    @property
    def pruned_share(self) -> float:
        """Share of the quantized weights that take no bits."""
        return self.depth_histogram[0]

    @property
    def file_bits_per_parameter(self) -> float:
        """8 × file bytes / parameters of the model."""
        return 8 * self.file_bytes / self.parameters

    def with_file(self, file_bytes: int, stage_seconds: dict[str, float]) -> ConversionReport:
        """The same report once the file is written."""
        return replace(self, file_bytes=file_bytes, stage_seconds=stage_seconds)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            **asdict(self),
            "pruned_share": self.pruned_share,
            "file_bits_per_parameter": self.file_bits_per_parameter,
        }

    def for_file(self) -> dict[str, Any]:
        """What goes into the container: nothing that changes from run to run, or with its size.

        Six digits are kept, so that the length hardly depends on the figures either.
        """
        values = asdict(replace(self, details=None))
        for name in ("stage_seconds", "file_bytes", "details"):
            del values[name]
        return {name: _rounded(value) for name, value in values.items()}


def longest_report(
    method: str,
    parameters: int,
    quantized_weights: int,
    matrices: int,
    calibration_tokens: int,
    decoder: DecoderReport,
) -> ConversionReport:
    """A report of a conversion to a rate or a size whose figures have their most digits."""
    figure = -1.23456e-05
    return ConversionReport(
        method=method,
        rate_bits_per_weight=figure,
        side_bits_per_weight=figure,
        parameters=parameters,
        quantized_weights=quantized_weights,
        matrices=matrices,
        depth_histogram=(figure,) * (MAX_DEPTH + 1),
        gained_biases=matrices,
        gain_exponent=figure,
        dual_variable=figure,
        ascent_steps=99,
        kl=figure,
        kl_standard_error=figure,
        perplexity_increase=figure,
        calibration_tokens=calibration_tokens,
        decoder=decoder,
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def depth_shares(tensors: Sequence[CompandedTensor]) -> tuple[float, ...]:
    """Share of the weights at each bit depth 0 … 8."""
    counts = np.sum([depth_histogram(t.depths, t.cluster_rows()) for t in tensors], axis=0)
    return tuple(float(c) for c in counts / counts.sum())

"""What a conversion can be asked for. The command line fills this in; so can Python code."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cvxq_converter.errors import ConversionError

GROUP_SIZE = 64
PARTITIONS = 8


@dataclass(frozen=True)
class ConversionOptions:
    """All choices of one conversion; the defaults are those that docs/ablation.md settled.

    bits: rate in bits per weight of the quantized matrices, side information included.
    size_bytes: size of the whole file instead of a rate.
    max_kl: the smallest file whose KL to the original, in nats per token on held-back calibration
        sequences, is no more. max_perplexity_increase: the same for the relative increase of
        perplexity. Exactly one of these four is given.
    sequences, length: of the calibration; None leaves them to the preflight.
    keep: shell patterns of matrix names left in 16 bits.
    gain: exponent of the gain folded into the level tables; None tries several and keeps the one
        with the least KL on the calibration sequences.
    """

    bits: float | None = None
    size_bytes: int | None = None
    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    method: str = "cvxq"  # or "rtn"
    group_size: int = GROUP_SIZE
    partitions: int = PARTITIONS
    keep: tuple[str, ...] = ()
    calibration: str = "self"  # or "none", or the path of a .txt or .jsonl file
    sequences: int | None = None
    length: int | None = None
    metric: str = "kl"  # or "logits"
    iterations: int = 1
    uniform_depths: bool = False  # every group alike, to see what the allocation is worth
    separable_depths: bool = True
    largest_error: float = 1 / 3  # share of a cluster's output power; 1 for no bound
    curve: str = "model"  # or "measured"
    levels: str = "fitted"  # or "compander"
    gain: float | None = None
    refine_scales: bool = True
    means: bool = True
    feedback: bool = True  # quantization errors are pushed onto the columns still to come
    correct_biases: bool = True
    tune: int = 0  # steps of `tuning`
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    revision: str | None = None

    def __post_init__(self) -> None:
        """Raise ConversionError for a target that is none."""
        losses = (self.max_kl, self.max_perplexity_increase)
        if [self.bits, self.size_bytes, *losses].count(None) != 3:
            raise ConversionError(
                "a conversion takes exactly one of bits, a size in bytes, a largest KL and a "
                "largest increase of perplexity"
            )
        if self.bits is not None and not 0 <= self.bits <= 8:  # NaN is not either
            raise ConversionError(f"{self.bits:g} bits per weight, allowed 0 to 8")
        for value in losses:
            if value is not None and not 0 < value < math.inf:
                raise ConversionError(f"a largest loss of {value:g}, allowed are numbers above 0")
        if self.tune and not self.replaces_weights:
            raise ConversionError("--tune needs calibration sequences and --method cvxq")
        if self.seeks_rate and (not self.replaces_weights or self.iterations > 1):
            raise ConversionError(
                "a largest KL or increase of perplexity needs calibration, --method cvxq and a "
                "single iteration"
            )

    @property
    def seeks_rate(self) -> bool:
        """Whether the rate is to be found by the loss that it leaves."""
        return self.bits is None and self.size_bytes is None

    @property
    def replaces_weights(self) -> bool:
        """Whether the conversion runs the quantized network, so that originals must be kept."""
        return self.method == "cvxq" and self.calibration != "none"

    def at_rate(self, bits: float) -> ConversionOptions:
        """The same choices for a rate, whatever the target was."""
        return replace(self, bits=bits, size_bytes=None, max_kl=None, max_perplexity_increase=None)

    def to_json(self) -> dict[str, Any]:
        """All options as JSON values, without paths: a calibration file gives its name only."""
        values = asdict(self)
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        values["keep"] = list(self.keep)
        values["calibration"] = Path(self.calibration).name
        del values["device"]
        return values

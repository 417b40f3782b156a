"""What a conversion can be asked for. The command line fills this in; so can Python code.

Four records, each for the stages that need it: the target, the calibration, the method, and the
place where the model lies and the work is done.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from cvxq_converter.errors import ConversionError

GROUP_SIZE = 64
PARTITIONS = 8


@dataclass(frozen=True)
class Target:
    """How large or how good the file is to be; exactly one of the four is given.

    bits: rate in bits per weight of the quantized matrices, side information included.
    size_bytes: of the whole file. max_kl: the smallest file whose KL to the original, in nats per
        token on held-back calibration sequences, is no more. max_perplexity_increase: the same for
        the relative increase of perplexity.
    """

    bits: float | None = None
    size_bytes: int | None = None
    max_kl: float | None = None
    max_perplexity_increase: float | None = None

    def __post_init__(self) -> None:
        """Raise ConversionError for a target that is none; make 4 bits the same as 4.0."""
        for name in ("bits", "max_kl", "max_perplexity_increase"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
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

    @property
    def seeks_rate(self) -> bool:
        """Whether the rate is to be found by the loss that it leaves."""
        return self.bits is None and self.size_bytes is None


@dataclass(frozen=True)
class Calibration:
    """What the model is measured on: sequences of its own, or from a text.

    source: "self", "copy" (of 6 bits, for models that memory has no room for), "none", or the path
    of a .txt or .jsonl file. sequences, length: how many, of how many tokens; None leaves them to
    the preflight. time: seconds that they may take on a CPU, by the preflight; None for what suits
    the size of the model. metric: "kl" or "logits".
    """

    source: str = field(default="self", metadata={"choice": "calibration"})
    sequences: int | None = None
    length: int | None = None
    time: float | None = None
    metric: str = "kl"
    seed: int = 0

    @property
    def reads_text(self) -> bool:
        """Whether the sequences come from a file."""
        return self.source not in ("self", "copy", "none")


@dataclass(frozen=True)
class Method:
    """How weights become codes; the defaults are those that docs/ablation.md settled.

    name: "cvxq" or "rtn". keep: shell patterns of matrix names left in 16 bits. iterations:
    measure and quantize so often. tune: steps of `tuning`; None leaves them to the time there
    is. The others have no option on the command line: they are what the ablation takes away.
    uniform_depths: every group alike. largest_error: share of a cluster's output power that may be
        lost; 1 for no bound. levels: "fitted" or "compander". gain: exponent of the gain folded
        into the level tables; None tries several and keeps the one with the least KL on the
        calibration sequences. feedback: errors are pushed onto the columns still to come.
    """

    name: str = field(default="cvxq", metadata={"choice": "method"})
    group_size: int = GROUP_SIZE
    partitions: int = PARTITIONS
    keep: tuple[str, ...] = ()
    iterations: int = 1
    tune: int | None = None
    uniform_depths: bool = False
    separable_depths: bool = True
    largest_error: float = 1 / 3
    levels: str = "fitted"
    gain: float | None = None
    refine_scales: bool = True
    means: bool = True
    feedback: bool = True
    correct_biases: bool = True


@dataclass(frozen=True)
class Place:
    """Where the work is done, in which type, and which revision of a hub id is meant.

    memory, disk: bytes that may be used, and scratch: the folder of temporary files; None for what
    is free, and for the folder of the output. They have no influence on the result.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    revision: str | None = None
    memory: int | None = None
    disk: int | None = None
    scratch: Path | None = None


@dataclass(frozen=True)
class ConversionOptions:
    """All choices of one conversion."""

    target: Target
    calibration: Calibration = Calibration()
    method: Method = Method()
    place: Place = Place()

    def __post_init__(self) -> None:
        """Raise ConversionError for choices that contradict each other."""
        amount = self.calibration
        if amount.time is not None and not self.replaces_weights:
            raise ConversionError("--time is for calibrating; it needs calibration sequences")
        if None not in (amount.time, amount.sequences, amount.length):
            raise ConversionError(
                "--time chooses the number of sequences or their length, and both are given; "
                "leave one of the three out"
            )
        if self.method.tune and not self.replaces_weights:
            raise ConversionError("--tune needs calibration sequences and --method cvxq")
        if self.target.seeks_rate and (not self.replaces_weights or self.method.iterations > 1):
            raise ConversionError(
                "a largest KL or increase of perplexity needs calibration, --method cvxq and a "
                "single iteration"
            )

    @classmethod
    def of(cls, **choices: Any) -> ConversionOptions:
        """Deal choices, by the names of the command line, to the records that hold them.

        Raises TypeError for a name that none of them has.
        """
        return cls(
            **{name: kind(**_taken(kind, choices)) for name, kind in _KINDS.items()}, **choices
        )

    def having(self, **choices: Any) -> ConversionOptions:
        """The same but for these choices, by the names of the command line."""
        changed = {
            name: replace(getattr(self, name), **_taken(kind, choices))
            for name, kind in _KINDS.items()
        }
        return replace(self, **changed, **choices)

    def at_rate(self, bits: float) -> ConversionOptions:
        """The same choices for a rate, whatever the target was."""
        return replace(self, target=Target(bits=bits))

    @property
    def replaces_weights(self) -> bool:
        """Whether the conversion runs the quantized network, so that originals must be kept."""
        return self.method.name == "cvxq" and self.calibration.source != "none"

    @property
    def leaves_tuning_open(self) -> bool:
        """Whether how much is tuned follows from the time there is, asked for or not.

        Whoever says how much to calibrate says so of tuning, too. No time is known of a GPU.
        """
        amount = self.calibration
        is_open = amount.time is not None or (amount.sequences is None and amount.length is None)
        on_cpu = torch.device(self.place.device).type == "cpu"
        return is_open and on_cpu and self.method.tune is None and self.replaces_weights

    def to_json(self) -> dict[str, Any]:
        """All options as JSON values, without paths: a calibration file gives its name only."""
        values = {
            _choice(item): value
            for record in (self.target, self.calibration, self.method, self.place)
            for item, value in zip(fields(record), asdict(record).values(), strict=True)
        }
        values["dtype"] = str(self.place.dtype).removeprefix("torch.")
        values["keep"] = list(self.method.keep)
        values["calibration"] = Path(self.calibration.source).name
        for without_influence in ("device", "memory", "disk", "scratch"):
            del values[without_influence]
        return values


_KINDS: dict[str, type] = {
    "target": Target,
    "calibration": Calibration,
    "method": Method,
    "place": Place,
}


def _choice(item: Any) -> str:
    """The name of a record's field on the command line."""
    return str(item.metadata.get("choice", item.name))


def _taken(kind: type, choices: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of a record out of the choices."""
    named = {_choice(item): item.name for item in fields(kind)}
    return {named[choice]: choices.pop(choice) for choice in [*choices] if choice in named}

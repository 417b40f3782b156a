"""What a conversion will take, in time, memory and disk, said before the work starts.

Costs come from the model's shapes and from two short measurements of this machine (arithmetic,
and the price of one small operation), a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from cvxq_format import memory

from cvxq_converter.amounts import calibration_amount
from cvxq_converter.costs import (
    Speed,
    backward_seconds,
    feedback_seconds,
    measure_speed,
    proving_seconds,
    quantizing_seconds,
    sampling_seconds,
)
from cvxq_converter.errors import ConversionError
from cvxq_converter.footprint import (
    COPY_BITS,
    disk_bytes,
    free_disk,
    peak_memory,
    plan_scratch,
    proving_bytes,
)
from cvxq_converter.measure.measurement import Measurement
from cvxq_converter.options import ConversionOptions, Place, Target
from cvxq_converter.quantize.tuning import sequences_of_a_step
from cvxq_converter.shapes import shape_of
from cvxq_converter.source.checkpoint import Source
from cvxq_converter.source.scratch import Scratch

EXPECTED_TRIALS = 4  # of a search for a loss

_READ_RATE = 5e8  # bytes per second from disk


@dataclass(frozen=True)
class Preflight:
    """The cost of a conversion, and the amount of calibration that it is for."""

    seconds: float
    peak_memory_bytes: int
    disk_bytes: int
    sequences: int  # 0 without calibration
    length: int
    proving_memory_bytes: int = 0  # at the end, where that much is free; else nothing is proved
    scratch_bytes: int = 0  # of temporary files
    origin: str = ""  # of the calibration's tokens, where it is not what was asked for
    rounds: int = 1  # of measuring, with some of the sequences in each
    room: int | None = None  # bytes of Hessians that are there at once; None for all of them
    steps: int = 0  # of tuning

    def line(self) -> str:
        """Say it in one line, for people."""
        calibration = (
            f"calibration {self.sequences} × {self.length} tokens{self.origin}"
            if self.sequences
            else "no calibration"
        )
        if self.steps:
            calibration += f", {self.steps} steps of tuning"
        memory = max(self.peak_memory_bytes, self.proving_memory_bytes)
        scratch = f" and {size_text(self.scratch_bytes)} for a while" if self.scratch_bytes else ""
        return (
            f"about {_duration(self.seconds)}, {size_text(memory)} of memory, "
            f"{size_text(self.disk_bytes)} on disk{scratch} ({calibration})"
        )


def preflight(
    source: Source,
    options: ConversionOptions,
    measurement: Measurement | None = None,
    *,
    trials: int | None = None,
    speed: Speed | None = None,
) -> Preflight:
    """Estimate a conversion of `source` and choose the amount of calibration.

    measurement: in place of calibrating and measuring. trials: rates to quantize at; those that a
    search takes, or one, if not given. speed: of this machine; measured if not given.
    """
    method, place = options.method, options.place
    shape = shape_of(source, method.keep)
    speed = speed or measure_speed(place.dtype, place.device)
    trials = trials or expected_trials(options.target)
    count, tokens = _amount(source, options, measurement)
    seconds = sum(info.stat().st_size for info in source.weight_files) / _READ_RATE
    if count and measurement is None:
        measuring = count * backward_seconds(shape, speed, tokens)
        seconds += method.iterations * measuring
        origin = options.calibration.source
        seconds += sampling_seconds(source, shape, speed, origin, count, tokens, place.dtype)
    scratch = plan_scratch(shape, options, count, tokens)
    quantizations = method.iterations * trials
    seconds += quantizations * quantizing_seconds(shape, speed, method.group_size)
    if count:
        factors, pushing = feedback_seconds(shape, speed, count * tokens)
        seconds += method.iterations * factors + quantizations * pushing
        if scratch.room is not None:  # once more for each quantization
            forward = count * backward_seconds(shape, speed, tokens) / 3
            seconds += quantizations * factors + (1 + quantizations) * forward
        step = sequences_of_a_step(tokens) * backward_seconds(shape, speed, tokens)
        seconds += trials * (method.tune or 0) * step
    seconds += proving_seconds(shape, speed)
    memory = peak_memory(source, shape, options, count, tokens)
    proving = proving_bytes(shape)
    disk = disk_bytes(source, shape, options)
    from_copy = options.calibration.source == "copy"
    origin = f" from a copy in {COPY_BITS} bits" if from_copy else ""
    return Preflight(
        seconds,
        memory,
        disk,
        count,
        tokens,
        proving,
        scratch.size,
        origin,
        scratch.rounds,
        scratch.room,
        (method.tune or 0) if count else 0,
    )


def _amount(
    source: Source, options: ConversionOptions, measurement: Measurement | None
) -> tuple[int, int]:
    """Number and length of the calibration sequences; none if they play no part."""
    wanted = options.calibration
    if not options.replaces_weights:
        return 0, 0
    if measurement is not None:
        return measurement.record.sequences, measurement.record.length
    return calibration_amount(source, options.place.device, wanted)


def expected_trials(target: Target) -> int:
    """How often a conversion quantizes: once, unless it seeks a rate."""
    return EXPECTED_TRIALS if target.seeks_rate else 1


def refuse_what_cannot_fit(plan: Preflight, output: Path, place: Place, held: int = 0) -> None:
    """Raise ConversionError, with the figure needed, if memory or disk is too small for `plan`.

    held: bytes of temporary files that are there from an earlier try.
    """
    if not fits_memory(plan, place):
        available = allowed_memory(place, place.device) or 0
        advice = "allow more" if place.memory else "free some, or use a machine with more"
        raise ConversionError(
            f"needs about {size_text(plan.peak_memory_bytes)} of memory on {place.device}, "
            f"{size_text(available)} are {'allowed' if place.memory else 'free'}; {advice}"
        )
    folder = output.absolute().parent
    if not folder.is_dir():
        raise ConversionError(f"{output}: its folder does not exist; create it first")
    scratch = Scratch(place.scratch).folder
    room = min(place.disk or plan.scratch_bytes, free_disk(scratch) + held)
    if plan.scratch_bytes > room:
        raise ConversionError(
            f"{scratch}: needs about {size_text(plan.scratch_bytes)} for temporary files, "
            f"{size_text(room)} are {'allowed' if place.disk == room else 'free'}; use less "
            "calibration, or another folder (--scratch)"
        )
    free = free_disk(folder)
    if plan.disk_bytes > free:
        raise ConversionError(
            f"{output}: needs about {size_text(plan.disk_bytes)} of disk, "
            f"{size_text(free)} are free; free some, or write elsewhere"
        )


def fits_memory(plan: Preflight, place: Place) -> bool:
    """Whether a conversion fits what may be used; it does where the system does not tell."""
    available = allowed_memory(place, place.device)
    return available is None or plan.peak_memory_bytes <= available


def allowed_memory(place: Place, device: str) -> int | None:
    """Bytes that may be used on a device: what is free, or less if that was said."""
    known = [n for n in (place.memory, available_memory(device)) if n is not None]
    return min(known, default=None)


def available_memory(device: str) -> int | None:
    """Bytes that can still be had on the device; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return memory.available_memory()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def size_text(count: int) -> str:
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"

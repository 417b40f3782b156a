"""What a conversion will take, in time, memory and disk, said before the work starts.

Costs come from the model's shapes and from two short measurements of this machine (arithmetic,
and the price of one small operation), a fraction of a second. The default amount of calibration
never depends on a measurement, or two runs would not give the same file: on a CPU it is what a
nominal machine of that many threads does in `calibration_seconds`.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cvxq_format import memory

from cvxq_converter.errors import ConversionError
from cvxq_converter.footprint import (
    COPY_BITS,
    disk_bytes,
    free_disk,
    peak_memory,
    plan_scratch,
    proving_bytes,
)
from cvxq_converter.measure.calibration import sampling_batch
from cvxq_converter.measure.measurement import Measurement
from cvxq_converter.options import Calibration, ConversionOptions, Place
from cvxq_converter.quantize.tuning import BATCH
from cvxq_converter.shapes import Shape, shape_of
from cvxq_converter.source.checkpoint import Source
from cvxq_converter.source.scratch import Scratch
from cvxq_converter.write.proof import MOST_PLACES as PROOF_PLACES

FULL_SEQUENCES, FULL_LENGTH = 128, 2048  # the papers' amount; the default on a GPU
CPU_LENGTH = 512  # shorter documents cost less per token and sample as many contexts
CALIBRATION_SECONDS = 300.0  # of sampling and measuring on a CPU, at the nominal speed,
CALIBRATION_WEIGHTS = 135e6  # for a model of so many weights or less; in proportion for a larger
MOST_CALIBRATION_SECONDS = 3600.0
NOMINAL_FLOPS = 45e9  # float32 operations per second and thread
NOMINAL_CALL = 8e-6  # seconds for one small tensor operation
LEAST_LENGTH = 64
EXPECTED_TRIALS = 4  # of a search for a loss

_SHARDS = 8  # of a measurement: sequences are a multiple of that
_TOKENS_FOR_EACH = 16  # that a sequence may have for each sequence that there is
_OPERATIONS_PER_LAYER = 50  # small tensor operations of one block, forward
_OPERATIONS_PER_EXPERT = 4  # of one matrix of it, forward
_OPERATIONS_PER_COLUMN = 120  # small tensor operations for each column, with feedback
_SAMPLING = 1.5  # times what the same products take where they are large
_QUANTIZER_PASSES = 45  # element-wise passes per weight: 13 scales, 3–4 passes each
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

    def line(self) -> str:
        """Say it in one line, for people."""
        calibration = (
            f"calibration {self.sequences} × {self.length} tokens{self.origin}"
            if self.sequences
            else "no calibration"
        )
        memory = max(self.peak_memory_bytes, self.proving_memory_bytes)
        scratch = f" and {size_text(self.scratch_bytes)} for a while" if self.scratch_bytes else ""
        return (
            f"about {_duration(self.seconds)}, {size_text(memory)} of memory, "
            f"{size_text(self.disk_bytes)} on disk{scratch} ({calibration})"
        )


@dataclass(frozen=True)
class Speed:
    """What a machine does per second, and how long it takes to start one operation."""

    flops: float  # matrix products
    elements: float  # element-wise, one pass
    call_seconds: float


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
    trials = trials or (EXPECTED_TRIALS if options.target.seeks_rate else 1)
    count, tokens = _amount(source, options, measurement)
    seconds = sum(info.stat().st_size for info in source.weight_files) / _READ_RATE
    if count and measurement is None:
        measuring = count * _backward_seconds(shape, speed, tokens)
        seconds += method.iterations * measuring
        origin = options.calibration.source
        seconds += _sampling_seconds(source, shape, speed, origin, count, tokens, place.dtype)
    scratch = plan_scratch(shape, options, count, tokens)
    quantizations = method.iterations * trials
    seconds += quantizations * _quantizing_seconds(shape, speed, method.group_size)
    if count:
        factors, pushing = _feedback_seconds(shape, speed, count * tokens)
        seconds += method.iterations * factors + quantizations * pushing
        if scratch.room is not None:  # once more for each quantization
            forward = count * _backward_seconds(shape, speed, tokens) / 3
            seconds += quantizations * factors + (1 + quantizations) * forward
        seconds += trials * method.tune * BATCH * _backward_seconds(shape, speed, tokens)
    seconds += _proving_seconds(shape, speed)
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


def refuse_what_cannot_fit(plan: Preflight, output: Path, place: Place, held: int = 0) -> None:
    """Raise ConversionError, with the figure needed, if memory or disk is too small for `plan`.

    held: bytes of temporary files that are there from an earlier try.
    """
    if not fits_memory(plan, place):
        available = allowed_memory(place, place.device) or 0
        advice = "use --calibration FILE or none, or a machine with more memory"
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


def calibration_seconds(shape: Shape) -> float:
    """How long calibrating on a CPU may take by default, at the nominal speed."""
    share = max(1.0, shape.matrix_weights / CALIBRATION_WEIGHTS)
    return min(CALIBRATION_SECONDS * share, MOST_CALIBRATION_SECONDS)


def calibration_amount(source: Source, device: str, wanted: Calibration) -> tuple[int, int]:
    """Choose number and length of the calibration sequences; what was asked for stays.

    Depends on shapes, kind of device and number of threads only, never on a measurement. Sequences
    are 512 tokens long if there is time for 32 of them, else half as long, and so on.
    Raises ConversionError for a time on a GPU, whose speed no nominal one stands for.
    """
    shape = shape_of(source)
    limit = shape.context or FULL_LENGTH
    if torch.device(device).type != "cpu":
        if wanted.time is not None:
            raise ConversionError(
                f"--time {wanted.time:g}s on {device}: it is for calibrating on a CPU; "
                "use --sequences"
            )
        return wanted.sequences or FULL_SEQUENCES, min(wanted.length or FULL_LENGTH, limit)
    threads = torch.get_num_threads()
    nominal = Speed(NOMINAL_FLOPS * threads, 2e8 * threads, NOMINAL_CALL)
    allowed = wanted.time or calibration_seconds(shape)
    longest = min(wanted.length or CPU_LENGTH, limit)
    # With a time of one's own, as many tokens as the papers had are not too many.
    most = FULL_SEQUENCES if wanted.time is None else FULL_SEQUENCES * FULL_LENGTH // longest
    counts = range(_SHARDS, max(most, _SHARDS) + 1, _SHARDS)

    def seconds(count: int, tokens: int) -> float:
        sampling = _sampling_seconds(source, shape, nominal, wanted.source, count, tokens)
        moments = _moments_seconds(shape, nominal, count * tokens)
        return sampling + count * _backward_seconds(shape, nominal, tokens) + moments

    tokens = longest
    while True:
        choices = [wanted.sequences] if wanted.sequences else counts
        held = bisect_right(choices, allowed, key=partial(seconds, tokens=tokens))
        count = choices[max(held, 1) - 1]
        enough = held and (wanted.sequences or count * _TOKENS_FOR_EACH >= tokens)
        if enough or wanted.length or tokens // 2 < LEAST_LENGTH:
            return count, tokens
        tokens //= 2


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


def measure_speed(dtype: torch.dtype, device: str) -> Speed:
    """Time matrix products, element-wise passes and small operations for a fraction of a second."""
    a = torch.randn(256, 1024, device=device).to(dtype)
    b = torch.randn(1024, 1024, device=device).to(dtype)
    flat, edges = torch.randn(1 << 18, device=device), torch.linspace(-1, 1, 7, device=device)
    small = torch.ones(8, device=device)
    product = _best_seconds(lambda: a @ b, device)
    passes = _best_seconds(lambda: torch.bucketize(flat, edges), device)
    call = _best_seconds(lambda: small + small, device)
    return Speed(2 * 256 * 1024 * 1024 / product, flat.numel() / passes, call)


def _best_seconds(work: Callable[[], Any], device: str) -> float:
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


# --- costs --------------------------------------------------------------------------------------


def _backward_seconds(shape: Shape, speed: Speed, tokens: int) -> float:
    """Forward, again, and back over one sequence: 6 operations per weight and token."""
    attention = 12 * shape.layers * shape.hidden * tokens**2
    flops = 6.0 * shape.weights_for_a_token * tokens + attention
    calls = 3 * _operations(shape) * speed.call_seconds
    return flops / speed.flops + calls


def _operations(shape: Shape) -> int:
    """Small tensor operations, forward, where every expert is come to."""
    of_experts = shape.routed_matrices * _OPERATIONS_PER_EXPERT
    return shape.layers * _OPERATIONS_PER_LAYER + of_experts


def _sampling_seconds(
    source: Source,
    shape: Shape,
    speed: Speed,
    origin: str,
    count: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
) -> float:
    """One forward step per position and batch, below the rate of large products; none of a text."""
    if origin not in ("self", "copy"):
        return 0.0
    flops = _SAMPLING * 2.0 * shape.weights_for_a_token * count * tokens
    if origin == "copy":  # by a decoder that hardly pays for small operations
        return flops / speed.flops
    batches = -(-count // sampling_batch(source.config, tokens, dtype.itemsize))
    return batches * tokens * _operations(shape) * speed.call_seconds + flops / speed.flops


def _quantizing_seconds(shape: Shape, speed: Speed, group_size: int) -> float:
    clusters = shape.quantized_weights / group_size / max(1, shape.hidden)
    calls = clusters * 5 * 13 * 12 * speed.call_seconds  # a few depths in each
    return calls + _QUANTIZER_PASSES / 3 * shape.quantized_weights / speed.elements


def _feedback_seconds(shape: Shape, speed: Speed, tokens: int) -> tuple[float, float]:
    """Of Hessians and their factors, once; and of pushing errors on, for every quantization."""
    factors = 2.0 * shape.squared_inputs * shape.largest_inputs  # in float64, half as fast
    calls = shape.inputs * _OPERATIONS_PER_COLUMN * speed.call_seconds
    once = _moments_seconds(shape, speed, tokens) + factors / speed.flops
    return once, calls + shape.pushed / speed.flops


def _moments_seconds(shape: Shape, speed: Speed, tokens: int) -> float:
    """Of the sums that Hessians are, with one more way forward."""
    operations = shape.squared_inputs_for_a_token + shape.weights_for_a_token
    return 2.0 * operations * tokens / speed.flops


def _proving_seconds(shape: Shape, speed: Speed) -> float:
    """One text through the network and through the decoder, twice where windows are long."""
    products = 2 * 2 * 2.0 * shape.weights_for_a_token * PROOF_PLACES / speed.flops
    return products + 2 * _operations(shape) * speed.call_seconds


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

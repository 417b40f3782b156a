"""How much calibration and tuning there is where nobody says.

Neither ever depends on a measurement, or two runs would not give the same file: on a CPU it is
what a nominal machine of that many threads and that kind does in a time that suits the model's
size, or in the one that was asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import partial

import torch

from cvxq_converter.costs import Speed, backward_seconds, moments_seconds, sampling_seconds
from cvxq_converter.errors import ConversionError
from cvxq_converter.options import Calibration
from cvxq_converter.products import rounds_fast
from cvxq_converter.quantize.tuning import sequences_of_a_step
from cvxq_converter.shapes import Shape, shape_of
from cvxq_converter.source.checkpoint import Source

FULL_SEQUENCES, FULL_LENGTH = 128, 2048  # the papers' amount; the default on a GPU
CPU_LENGTH = 512  # shorter documents cost less per token and sample as many contexts
CALIBRATION_SECONDS = 300.0  # of sampling and measuring on a CPU, at the nominal speed,
CALIBRATION_WEIGHTS = 135e6  # for a model of so many weights or less; in proportion for a larger
MOST_CALIBRATION_SECONDS = 3600.0
NOMINAL_FLOPS = 45e9  # float32 operations per second and thread,
NOMINAL_FLOPS_WITH_BFLOAT16 = 80e9  # of one that multiplies bfloat16, too
TUNING_FASTER = 2.0  # times as fast it is in bfloat16
NOMINAL_CALL = 8e-6  # seconds for one small tensor operation
LEAST_LENGTH = 64
CALIBRATED = 0.46  # of the default time, the rest is for tuning;
CALIBRATED_LONGER = 0.25  # of a longer one, where that is more: further tokens gain little
DEFAULT_STEPS = 12  # of tuning, at most,
MOST_STEPS = 240  # and in a time that was asked for
_SHARDS = 8  # of a measurement: sequences are a multiple of that
_TOKENS_FOR_EACH = 8  # that a sequence may have for each sequence that there is


def calibration_seconds(shape: Shape) -> float:
    """How long calibrating on a CPU may take by default, at the nominal speed."""
    share = max(1.0, shape.matrix_weights / CALIBRATION_WEIGHTS)
    return min(CALIBRATION_SECONDS * share, MOST_CALIBRATION_SECONDS)


def calibration_amount(source: Source, device: str, wanted: Calibration) -> tuple[int, int]:
    """Choose number and length of the calibration sequences; what was asked for stays.

    Depends on shapes, kind of device and number of threads only, never on a measurement. Sequences
    are 512 tokens long if there is time for 64 of them, else half as long, and so on.
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
    nominal = _nominal_speed()
    allowed, _ = _shares(shape, wanted)
    longest = min(wanted.length or CPU_LENGTH, limit)
    # With a time of one's own, as many tokens as the papers had are not too many.
    most = FULL_SEQUENCES if wanted.time is None else FULL_SEQUENCES * FULL_LENGTH // longest
    counts = range(_SHARDS, max(most, _SHARDS) + 1, _SHARDS)

    def seconds(count: int, tokens: int) -> float:
        sampling = sampling_seconds(source, shape, nominal, wanted.source, count, tokens)
        moments = moments_seconds(shape, nominal, count * tokens)
        return sampling + count * backward_seconds(shape, nominal, tokens) + moments

    tokens = longest
    while True:
        choices = [wanted.sequences] if wanted.sequences else counts
        held = bisect_right(choices, allowed, key=partial(seconds, tokens=tokens))
        count = choices[max(held, 1) - 1]
        enough = held and (wanted.sequences or count * _TOKENS_FOR_EACH >= tokens)
        if enough or wanted.length or tokens // 2 < LEAST_LENGTH:
            return count, tokens
        tokens //= 2


def tuning_steps(source: Source, wanted: Calibration, trials: int = 1) -> int:
    """How many steps of tuning there is time for.

    trials: quantizations that share a time that was asked for; the default is for each.
    """
    shape = shape_of(source)
    _, tokens = calibration_amount(source, "cpu", wanted)
    _, allowed = _shares(shape, wanted)
    speed = _nominal_speed()
    if rounds_fast():
        speed = replace(speed, flops=TUNING_FASTER * speed.flops)
    step = sequences_of_a_step(tokens) * backward_seconds(shape, speed, tokens)
    if wanted.time is None:
        return min(int(allowed / step), DEFAULT_STEPS)
    return min(int(allowed / (trials * step)), MOST_STEPS)


def _shares(shape: Shape, wanted: Calibration) -> tuple[float, float]:
    """Seconds for calibrating, and for tuning."""
    default = calibration_seconds(shape)
    time = default if wanted.time is None else wanted.time
    calibrating = min(time, max(CALIBRATED * default, CALIBRATED_LONGER * time))
    return calibrating, time - calibrating


def _nominal_speed() -> Speed:
    threads = torch.get_num_threads()
    flops = NOMINAL_FLOPS_WITH_BFLOAT16 if rounds_fast() else NOMINAL_FLOPS
    return Speed(flops * threads, 2e8 * threads, NOMINAL_CALL)

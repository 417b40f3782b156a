"""Measure a loaded model: prefill, decoding, the bytes it reads, and what memory could give.

Decoding one token reads every weight of the matrices once, so on most machines its speed is a
memory bandwidth. The bytes counted are those that are held and read, in whatever form the weights
have; times tokens/s this is a bandwidth, to be compared with that of a plain
copy measured in the same run (bytes read plus bytes written, as in STREAM).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cvxq.progress import Progress
from cvxq.sample import SamplingSettings
from cvxq.session import Session

if TYPE_CHECKING:
    from cvxq.lean.native_decoder import NativeDecoder

COPY_BYTES = 1 << 28  # 256 MiB, beyond the caches of current CPUs
DEVICE_COPY_BYTES = 1 << 30  # 1 GiB, beyond those of current GPUs
COPY_REPEATS = 5


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of repeated measurements (0 for a single one)."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), deviation)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of reading a prompt and of generating one token after the other."""

    prefill: Spread
    decode: Spread


def measure_speed(
    start: Callable[[], Session],
    vocabulary: int,
    prompt_tokens: int,
    tokens: int,
    repeats: int,
    progress: Progress,
) -> Speed:
    """Read `prompt_tokens` random tokens and generate `tokens` greedily, `repeats` times.

    start: makes an empty session. One shorter round warms up and is not counted.
    """
    prompt = np.random.default_rng(0).integers(vocabulary, size=prompt_tokens).tolist()
    _round(start(), prompt, min(tokens, 4))
    rounds = []
    for index in range(repeats):
        rounds.append(_round(start(), prompt, tokens))
        progress("measure", index + 1, repeats)
    return Speed(
        prefill=Spread.of([prompt_tokens / prefill for prefill, _ in rounds]),
        decode=Spread.of([tokens / decode for _, decode in rounds]),
    )


def _round(session: Session, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Return the seconds until the first token comes, and those of `tokens` tokens more."""
    begin = time.perf_counter()
    drawn = session.draw(prompt, SamplingSettings(temperature=0))
    next(drawn)
    middle = time.perf_counter()
    for _ in range(tokens):
        next(drawn)
    return middle - begin, time.perf_counter() - middle


def overhead_seconds_per_layer(decoder: NativeDecoder, tokens: int) -> float:
    """Seconds that one layer spends beside matrices and attention when a token is decoded.

    The mean over `tokens` tokens.
    """
    decoder.rewind(0)
    decoder.feed([0])
    before = decoder.overhead_seconds()
    for _ in range(tokens):
        decoder.feed([0])
    return (decoder.overhead_seconds() - before) / tokens / decoder.layers


def copy_bandwidth(threads: int) -> float:
    """Bytes per second, read plus written, of the fastest of a few large copies in memory."""
    source = np.zeros(COPY_BYTES, np.uint8)
    target = np.ones(COPY_BYTES, np.uint8)  # written once, so that its pages exist
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COPY_REPEATS):
            begin = time.perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))  # without Python's lock
            seconds.append(time.perf_counter() - begin)
    return 2 * COPY_BYTES / min(seconds)


def device_copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of the fastest of a few large copies on a GPU."""
    import torch

    from cvxq import cuda

    source = torch.zeros(DEVICE_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = []
    for _ in range(COPY_REPEATS):
        cuda.synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * DEVICE_COPY_BYTES / min(seconds)


def device_peak_memory_bytes(device: str) -> int:
    """Most memory that tensors have held on a GPU so far."""
    from cvxq import cuda

    return cuda.peak_bytes(device)


def peak_memory_bytes() -> int | None:
    """Most memory this process has held so far, mapped file pages included, if known here."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, this does not inherit the parent's peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None

"""All that the kernels ask of `torch.cuda`, so that one place says how it is used."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def processors(device: torch.device) -> int:
    """How many multiprocessors `device` has; 1 where it is no GPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (9, 0) for instance."""
    return torch.cuda.get_device_capability(device)


def name_of(device: torch.device) -> str:
    """What its maker calls `device`, or its kind where it is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def median_seconds(
    action: Callable[[], object], before: Callable[[], object], repeats: int
) -> float:
    """Median time on the current device of several calls of `action`, each after one of `before`.

    Work is launched throughout without waiting; events of the device tell the times.
    """
    spans = []
    for _ in range(repeats):
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in spans) / 1e3

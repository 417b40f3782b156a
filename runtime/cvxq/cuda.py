"""All that the runtime asks of `torch.cuda`, so that one place says how it is used."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable
from functools import cache

import torch


def resolve(device: torch.device | str) -> torch.device:
    """Return `device` with its index, the current device's where it names none."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def use(device: torch.device) -> None:
    """Let this thread launch on `device`, which Triton and streams take from the thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@cache
def runs_kernels(device: torch.device) -> bool:
    """Tell whether Triton's kernels run on `device`; where they do not, warn once, saying why.

    Triton is not made for every platform, and needs a C compiler where it runs.
    """
    try:
        from cvxq_kernels.decode import Norm, launch

        launch.normalize(torch.ones(1, 16, device=device), Norm("rms", None, None, 1e-6))
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        found = str(error).splitlines() or [type(error).__name__]
        warnings.warn(
            f"Triton's kernels cannot run here ({found[0]}), so matrices are expanded, which takes "
            "the original model's memory",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has done all that was launched."""
    torch.cuda.synchronize(resolve(device))


def peak_bytes(device: torch.device | str) -> int:
    """Most bytes that tensors have held on `device` so far."""
    return torch.cuda.max_memory_allocated(resolve(device))


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors can still have on `device`."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused


def mark() -> Callable[[], None]:
    """Return a function that waits until the device has done what was launched so far."""
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def capture(
    compute: Callable[[], None], generator: torch.Generator | None = None
) -> Callable[[], None]:
    """Capture the launches of `compute` as a CUDA graph; return what replays it.

    generator: one that `compute` draws from.  `compute` runs a few times first, so that kernels
    are compiled and libraries have their workspaces; it must bear that.  Other threads may go on
    using the device.
    Raises RuntimeError when something in it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    return graph.replay

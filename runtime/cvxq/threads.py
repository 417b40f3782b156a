"""How many threads work on the CPU where the user does not say: one place for all commands."""

from __future__ import annotations

from cvxq_kernels.cpu.processors import available_processors

BYTES_PER_THREAD = 1 << 19  # of a file: what a core reads in less time than sharing takes


def useful_threads(file_bytes: int) -> int:
    """How many threads decode fastest: one for every half megabyte of weights, all at most.

    Work is shared out five times in a layer, which costs tiny models more than it gains.
    """
    return min(available_processors(), 1 + file_bytes // BYTES_PER_THREAD)


def set_torch_threads(threads: int | None) -> None:
    """Let torch use so many threads; if None as many as now, but no more than have processors."""
    import torch

    wanted = threads or min(torch.get_num_threads(), available_processors())
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)

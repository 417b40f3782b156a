"""The native kernels' threads in a process whose threads vLLM has bound to processors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache

import torch
from cvxq_kernels import cpu

# How vLLM tells each kind of OpenMP which processors a rank may use: "…proclist=[0,1]", "0 1",
# "{0,1}".
_BINDINGS = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PLACES")
_PROCESSORS = re.compile(r"(?:.*proclist=)?[\[{]?(\d+(?:[ ,]+\d+)*)[\]}]?")


def bound_processors(environment: Mapping[str, str]) -> set[int]:
    """Return the processors that vLLM has given this rank, empty where it has not."""
    for name in _BINDINGS:
        found = _PROCESSORS.fullmatch(environment.get(name, ""))
        if found:
            return {int(number) for number in re.split("[ ,]+", found[1])}
    return set()


@cache
def pool() -> cpu.Pool:
    """Return as many threads as torch has, allowed on all processors of this rank.

    OpenMP binds the thread that calls it to one processor, and threads inherit that.
    """
    threads = torch.get_num_threads()
    chosen = bound_processors(os.environ)
    if not chosen or not hasattr(os, "sched_setaffinity"):
        return cpu.Pool(threads)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, chosen)
        return cpu.Pool(threads)
    except OSError:  # not ours to choose
        return cpu.Pool(threads)
    finally:
        os.sched_setaffinity(0, before)

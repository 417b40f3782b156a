"""Compile a matrix's kernels in processes, then launch them but for the GPU; see `test_compiling`.

Prints how many kernels were recorded, how many failed, and how many the launches compiled anew.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from cvxq_kernels.gpu import GpuWeight, launch
from cvxq_kernels.gpu.compiling import compile_all, recording
from cvxq_kernels.gpu.matrix import arrange
from cvxq_kernels.gpu.tuning import launch_all
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from gpu_weights import random_packed


class NoDevice:
    """What Triton asks of a device before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled() -> int:
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))


def launches() -> None:
    launch_all(GpuWeight(arrange([packed], torch.device("cpu"))), 1, torch.float16)


driver.set_active(NoDevice())
launch.uses_ptx = lambda device: True
packed = random_packed(128, 64, torch.full((2, 64), 3), torch.device("cpu"))
with recording() as sources:
    launches()
begin = time.monotonic()
failed = compile_all(sources, 2)
before = compiled()
JITFunction.__getitem__ = lambda self, grid: (
    lambda *args, **options: self.run(*args, grid=grid, warmup=True, **options)
)
launches()
print(len(sources), failed, before, compiled() - before, f"{time.monotonic() - begin:.1f} s")

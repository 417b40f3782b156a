"""Kernels that start before the kernel before them has ended.

At one token per step a kernel lasts some microseconds, and the gap to the next costs one more.
From Hopper on, the next may be launched early: it does what depends on nothing (a matvec asks for
its weights), and then waits until the one before has ended and its writes are seen.  A kernel that
is launched so must wait before it reads or writes anything that another one touches; so the one
after it knows that all kernels before have ended, too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from cvxq_kernels.gpu.device import capability

FIRST_CAPABILITY = (9, 0)

_WAIT = tl.constexpr("griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;")


@triton.jit
def wait_for_the_kernel_before(OVERLAP: tl.constexpr):
    """Wait until all kernels before have ended; from here on the next one may start."""
    if OVERLAP:
        tl.inline_asm_elementwise(_WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@cache
def overlaps(device: torch.device) -> bool:
    """Tell whether kernels on `device` may be launched so, by the device and by Triton."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return False
    knows = "launch_pdl" in CUDAOptions.__dataclass_fields__
    return knows and capability(device) >= FIRST_CAPABILITY


def early(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch on `device` of a kernel that takes OVERLAP."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}

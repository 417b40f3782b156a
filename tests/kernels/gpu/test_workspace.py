"""Scratch lives as long as a matrix that may use it."""

from __future__ import annotations

import gc
from weakref import ref

import torch
from cvxq_kernels.gpu.workspace import default_workspace


def test_the_shared_scratch_goes_with_its_last_user() -> None:
    device = torch.device("meta")
    work = default_workspace(device)
    assert default_workspace(device) is work
    buffer = ref(work.take("partial", 8, torch.float32))
    assert buffer() is not None
    del work
    gc.collect()
    assert buffer() is None

"""What multiplies the float32 matrices of a conversion on a CPU, and how exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

COARSE = 0.02  # nats: a loss from which on what bfloat16 adds, 0.0006 of it, is small


@contextmanager
def fast_products(device: str) -> Iterator[None]:
    """Let oneDNN multiply where it is more than twice as fast as MKL, and no less exact.

    PyTorch gives float32 products to MKL, which does not use what AMD's processors with AVX-512
    have; the precision "medium" gives them to oneDNN. That may round inputs to bfloat16, but does
    so only where matrix units (AMX) gain by it, and there nothing is changed. Nor is it on other
    devices, which would compute in TF32.
    """
    if device != "cpu" or not _onednn_is_faster():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def coarse_products(device: str, loss: float) -> AbstractContextManager[Any]:
    """Round what is multiplied to bfloat16 where a processor multiplies that faster.

    For steps of tuning, which average over its errors. loss: KL in nats per token that is to be
    lowered; bfloat16 is for those far above its own.
    """
    faster = device == "cpu" and rounds_fast() and loss > COARSE
    return torch.autocast("cpu", torch.bfloat16) if faster else nullcontext()


def instructions() -> str:
    """What this processor's products are made of: others round, and sample, otherwise."""
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{widest}, bfloat16" if rounds_fast() else widest


def rounds_fast() -> bool:
    """Whether this is a processor with instructions that multiply bfloat16."""
    return _has("avx512_bf16")


def _onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 for bfloat16 and no AMX: AMD's since Zen 4."""
    return rounds_fast() and not _has("amx_tile")


def _has(what: str) -> bool:
    asked = getattr(torch.cpu, f"_is_{what}_supported", None)
    return asked is not None and bool(asked())

"""Which library multiplies the float32 matrices of a conversion on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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


def _onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 for bfloat16 and no AMX: AMD's since Zen 4."""

    def has(what: str) -> bool:
        asked = getattr(torch.cpu, f"_is_{what}_supported", None)
        return asked is not None and bool(asked())

    return has("avx512_bf16") and not has("amx_tile")

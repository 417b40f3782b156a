"""Where a model computes: what `--device` may say, and whether it is there."""

from __future__ import annotations

import re

from cvxq.errors import ArgumentError, UnsupportedModelError
from cvxq.extras import need


def resolve_device(device: str) -> str:
    """Return `device` ("cpu", "cuda" or "cuda:N") if it can be used, as "cpu" or "cuda:N".

    torch is imported for a CUDA device only.

    Raises ArgumentError for another name or a number that no device has, UnsupportedModelError
    when there is no CUDA device at all, or no torch.
    """
    if device == "cpu":
        return device
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ArgumentError(f"device is {device!r}, allowed: cpu, cuda, cuda:N")
    need("cuda", f"device {device!r}")
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedModelError(
            f"PyTorch {torch.__version__} finds no CUDA device here; use --device cpu, or install "
            "a CUDA build of PyTorch on a machine with an NVIDIA GPU"
        )
    from cvxq import cuda

    _, _, number = device.partition(":")
    count = torch.cuda.device_count()
    if number and int(number) >= count:
        raise ArgumentError(f"device is {device!r}, allowed: cuda:0 to cuda:{count - 1}")
    return str(cuda.resolve(device))

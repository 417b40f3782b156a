"""Unquantized tensors of a file as torch tensors."""

from __future__ import annotations

import torch
from cvxq_format import RawTensor


def raw_to_torch(value: RawTensor) -> torch.Tensor:
    """Copy a tensor out of the file, on the CPU, its shape and type unchanged."""
    data = value.data.copy()
    if value.dtype == "bf16":  # which numpy does not have
        tensor = torch.from_numpy(data.view("int16")).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(data)
    return tensor.reshape(value.shape)

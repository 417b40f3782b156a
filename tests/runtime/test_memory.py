"""What packed weights are for: memory. Counted exactly, as bytes of live tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxq
import pytest
import torch
from cvxq_kernels import cpu, packed


def test_a_forward_pass_expands_one_matrix_at_a_time(
    make_file: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, live_bytes: Any
) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)  # native kernels expand nothing
    monkeypatch.setattr(packed, "CHUNK_WEIGHTS", 256)  # as small beside these as by default
    made = make_file("llama")
    sizes = [4 * p.numel() for p in made.network.parameters() if p.dim() == 2]
    ids = torch.tensor([[5]])
    peaks = {}
    for weights in ("packed", "dense"):
        with cvxq.load(made.path, weights=weights) as model, live_bytes() as live:
            model.network(input_ids=ids, use_cache=False)
            peaks[weights] = live.most
    # Beside the matrix: temporaries of one chunk, and activations, which `dense` has as well.
    assert peaks["packed"] > max(sizes)
    assert peaks["packed"] < max(sizes) + peaks["dense"] + 256 * 40
    assert peaks["packed"] < 0.4 * sum(sizes)

"""What packed weights are for: memory. Counted exactly, as bytes of live tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import cvxq
import pytest
import torch
from cvxq_kernels import cpu, packed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                place = storage.data_ptr()
                if place not in given and place not in self._known and storage.nbytes():
                    self._known.add(place)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, place, storage.nbytes())
        return result

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def test_a_forward_pass_expands_one_matrix_at_a_time(
    make_file: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)  # native kernels expand nothing
    monkeypatch.setattr(packed, "CHUNK_WEIGHTS", 256)  # as small beside these as by default
    made = make_file("llama")
    sizes = [4 * p.numel() for p in made.network.parameters() if p.dim() == 2]
    ids = torch.tensor([[5]])
    peaks = {}
    for weights in ("packed", "dense"):
        with cvxq.load(made.path, weights=weights) as model, LiveBytes() as live:
            model.network(input_ids=ids, use_cache=False)
            peaks[weights] = live.most
    # Beside the matrix: temporaries of one chunk, and activations, which `dense` has as well.
    assert peaks["packed"] > max(sizes)
    assert peaks["packed"] < max(sizes) + peaks["dense"] + 256 * 40
    assert peaks["packed"] < 0.4 * sum(sizes)

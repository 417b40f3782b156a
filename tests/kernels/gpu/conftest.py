"""Weights with chosen depths, and where to run kernels: a GPU, or Triton's interpreter.

The files `interpreted_*.py` are run by `test_kernels.py` in processes of their own: in Triton's
interpreter, which is switched on before Triton is loaded, and on a GPU where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_format import Codebook, CompandedTensor, pack_codes
from cvxq_kernels import PackedWeight
from cvxq_kernels.gpu import workspace

CODEBOOK = Codebook.default()

Make = Callable[..., PackedWeight]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device that kernels run on."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cuda" if torch.cuda.is_available() and not interpreted else "cpu")


@pytest.fixture
def make(random_companded: Callable[..., CompandedTensor]) -> Make:
    """Return a maker of packed weights: make((N, K), depths, seed=0, scale=0.1, codebook=…, …).

    depths: one, or an array that broadcasts to (clusters, K); the rest as for `random_companded`.
    gaussian: codes of Gaussian weights, for a single depth; otherwise all codes are as likely.
    """

    def maker(
        shape: tuple[int, int],
        depths: Any = None,
        *,
        seed: int = 0,
        scale: float = 0.1,
        codebook: Codebook = CODEBOOK,
        gaussian: bool = False,
        **options: Any,
    ) -> PackedWeight:
        options = {"group_size": 16, "partitions": 1, "means": False} | options
        tensor = random_companded(shape, seed, **options)
        if depths is not None:
            chosen = np.broadcast_to(depths, tensor.depths.shape).astype(np.uint8)
            deep = np.repeat(chosen, tensor.cluster_rows(), axis=1).astype(np.int64)
            rng = np.random.default_rng(seed)
            if gaussian:
                levels = codebook.levels[int(depths) - 1]
                middles = (levels[1:] + levels[:-1]) / 2
                codes = np.searchsorted(middles, rng.standard_normal(deep.shape))
            else:
                codes = rng.integers(0, 256, deep.shape) % (1 << deep)
            packed = pack_codes(
                codes.astype(np.uint8), chosen, tensor.group_size, tensor.partitions
            )
            tensor = replace(tensor, depths=chosen, packed_codes=packed)
        return PackedWeight.from_tensor(replace(tensor, scale_unit=np.float32(scale)), codebook)

    return maker


@pytest.fixture(autouse=True)
def within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter refuse an address outside the tensors that a kernel was given."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    extents: list[tuple[int, int]] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, load, store = (
        executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    )  # fmt: skip

    def prepared(self: Any, args: Any, kwargs: Any) -> Any:
        found = prepare(self, args, kwargs)
        storages = [
            value.untyped_storage()
            for value in (*found[0], *found[1].values())
            if isinstance(value, torch.Tensor)
        ]
        extents[:] = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)
        return found

    def check(pointers: Any, mask: Any) -> None:
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        first = pointers.data[live].astype(np.int64)
        last = first + pointers.get_element_ty().primitive_bitwidth // 8
        starts, ends = (np.array(side, np.int64) for side in zip(*extents, strict=True))
        which = np.searchsorted(starts, first, side="right") - 1
        assert (which >= 0).all(), "an address before any tensor"
        assert (last <= ends[which]).all(), "an address past the end of a tensor"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "_init_args_hst", prepared)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


@pytest.fixture(autouse=True, scope="session")
def work(device: torch.device) -> workspace.Workspace:
    """Keep the scratch that all tests share."""
    return workspace.default_workspace(device)


@pytest.fixture(autouse=True)
def poisoned(work: workspace.Workspace) -> None:
    """Leave nothing in the shared scratch that a kernel could use by mistake."""
    for name, buffer in work.buffers.items():
        if name != "arrived":  # counts that a kernel leaves at zero
            buffer.view(torch.uint8).fill_(255)  # NaN, and −1


@pytest.fixture(scope="session")
def nans(device: torch.device) -> Callable[..., torch.Tensor]:
    """Return a maker of tensors in which nothing unwritten passes a comparison."""
    return lambda *shape, dtype=torch.float32: torch.full(
        shape, float("nan"), dtype=dtype, device=device
    )

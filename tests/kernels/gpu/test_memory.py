"""What arranging and choosing a plan take of a device's memory, by every allocation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cvxq_format import Codebook, CompandedTensor
from cvxq_kernels import PackedWeight
from cvxq_kernels.gpu import GpuWeight, launch, matrix, part, repack, tuning
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEBIBYTE = 1 << 20
COLUMNS = 4096


class Account(TorchDispatchMode):
    """While entered, counts the bytes of the storages that operations make; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` and count what it made."""
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if not size or place in self._known or place in given:
            return
        self._known.add(place)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.held -= size


class NoKernel:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **named: None


@pytest.fixture
def head(
    random_companded: Callable[..., CompandedTensor], monkeypatch: pytest.MonkeyPatch
) -> PackedWeight:
    """An output head of 8 Mi weights, a 64th of Llama-3's, in groups of 64."""
    for module, names in (
        (repack, ["repack_kernel"]),
        (launch, ["matvec_kernel", "gemm_kernel", "transpose_kernel", "expand_kernel"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, NoKernel())
    tensor = random_companded((2048, COLUMNS), 0, group_size=64, partitions=1, means=False)
    return PackedWeight.from_tensor(tensor, Codebook.default())


def test_the_account_counts_what_is_alive() -> None:
    with Account() as account:
        first = torch.zeros(1000, dtype=torch.uint8)
        view = first[10:]
        assert account.held == 1000
        second = first + view.new_ones(1000)
        del first, view
        assert account.held == len(second)
    assert account.peak == 3000


def test_arranging_takes_little_beside_the_matrix(
    head: PackedWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28 bytes for each group while tables are made: 220 MiB for the largest heads."""
    monkeypatch.setattr(part, "STEP", 4)
    monkeypatch.setattr(part, "CHUNKS_STEP", 512)
    with Account() as account:
        weight = GpuWeight.from_packed(head, "cpu")
    groups = head.scale_codes.numel()
    held = weight.nbytes
    assert account.held == pytest.approx(held, rel=0.01)
    assert account.peak - held <= 28 * groups


def test_choosing_a_plan_takes_one_block_of_expanded_weights(
    head: PackedWeight, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """4 MiB here, where a block is a sixteenth of what it is; the whole head would be 32 MiB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (matrix, launch):
        monkeypatch.setattr(module, "BLOCK_WEIGHTS", 1 << 20)
    weight = GpuWeight.from_packed(head, "cpu")
    weight.processors = 132
    with Account() as account:
        tuning.tune(weight, [1], torch.float32, lambda action: 1.0)
    outputs, inputs = weight.shape
    scratch = sum(buffer.nbytes for buffer in weight.workspace.buffers.values())
    assert account.peak >= 4 * MEBIBYTE
    assert account.peak - scratch <= 4 * MEBIBYTE + 16 * 4 * (outputs + inputs)
    assert tuning.SCRATCH_BYTES <= 64 * MEBIBYTE

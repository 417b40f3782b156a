"""What arranging and choosing a plan take of a device's memory, by every allocation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cvxq_format import Codebook, CompandedTensor
from cvxq_kernels import PackedWeight
from cvxq_kernels.gpu import (
    GpuWeight,
    UnsupportedWeightError,
    launch,
    matrix,
    part,
    repack,
    tuning,
)
from cvxq_kernels.gpu.plan import Plan

MEBIBYTE = 1 << 20
COLUMNS = 4096


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
        (launch, ["matvec_kernel", "gemm_kernel", "sort_kernel", "expand_kernel"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, NoKernel())
    tensor = random_companded((2048, COLUMNS), 0, group_size=64, partitions=1, means=False)
    return PackedWeight.from_tensor(tensor, Codebook.default())


def test_the_account_counts_what_is_alive(live_bytes: Any) -> None:
    with live_bytes() as account:
        first = torch.zeros(1000, dtype=torch.uint8)
        view = first[10:]
        assert account.now == 1000
        second = first + view.new_ones(1000)
        del first, view
        assert account.now == len(second)
    assert account.most == 3000


def test_arranging_takes_little_beside_the_matrix(
    head: PackedWeight, monkeypatch: pytest.MonkeyPatch, live_bytes: Any
) -> None:
    """28 bytes for each group while tables are made: 220 MiB for the largest heads."""
    monkeypatch.setattr(part, "STEP", 4)
    monkeypatch.setattr(part, "CHUNKS_STEP", 512)
    with live_bytes() as account:
        weight = GpuWeight.from_packed(head, "cpu")
    groups = head.scale_codes.numel()
    held = weight.nbytes
    assert account.now == pytest.approx(held, rel=0.01)
    assert account.most - held <= 28 * groups


def test_choosing_a_plan_takes_one_block_of_expanded_weights(
    head: PackedWeight, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, live_bytes: Any
) -> None:
    """4 MiB here, where a block is a sixteenth of what it is; the whole head would be 32 MiB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (matrix, launch):
        monkeypatch.setattr(module, "BLOCK_WEIGHTS", 1 << 20)
    weight = GpuWeight.from_packed(head, "cpu")
    weight.processors = 132
    with live_bytes() as account:
        tuning.tune(weight, [1], torch.float32, lambda action: 1.0)
    outputs, inputs = weight.shape
    scratch = sum(buffer.nbytes for buffer in weight.workspace.buffers.values())
    assert account.most >= 4 * MEBIBYTE
    assert account.most - scratch <= 4 * MEBIBYTE + 16 * 4 * (outputs + inputs)
    assert tuning.SCRATCH_BYTES <= 64 * MEBIBYTE


def test_more_words_than_an_index_reaches_are_refused(
    head: PackedWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "cut", lambda weight, rows: SimpleNamespace(words=1 << 30))
    with pytest.raises(UnsupportedWeightError, match="2147483648 rows of words, allowed below"):
        matrix.arrange([head, head], torch.device("cpu"))


def test_plans_that_cannot_be_written_are_measured_anew(tmp_path: Path) -> None:
    """Where the cache's folder would be is a file."""
    (tmp_path / "cvxq").write_text("")
    path = tmp_path / "cvxq" / "plans-x.json"
    tuning.save(path, {"key": Plan("matvec")})
    assert tuning.load(path) == {}

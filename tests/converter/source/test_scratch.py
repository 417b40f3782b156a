"""Tensors in files: zeros at first, no trace on the disk, one line when it is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from cvxq_converter.errors import ConversionError
from cvxq_converter.source.scratch import SMALLEST, Scratch


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell anonymous memory apart")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [3, SMALLEST // 8])
def test_it_holds_what_is_written(dtype: torch.dtype, rows: int, tmp_path: Path) -> None:
    stored = Scratch(tmp_path).zeros((rows, 8), dtype)
    assert stored.shape == (rows, 8)
    assert stored.dtype is dtype
    assert not stored.any()
    stored[rows - 1, 3] = 1.5
    assert float(stored.sum()) == 1.5
    assert torch.equal(Scratch(tmp_path).copy(stored), stored)
    assert not list(tmp_path.iterdir())


def test_it_takes_no_memory_of_its_own() -> None:
    before = anonymous_bytes()
    stored = Scratch().zeros((64, 1 << 20), torch.float32).fill_(1)  # 256 MiB
    assert anonymous_bytes() - before < 32 << 20
    assert float(stored[63, -1]) == 1


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ConversionError, match=r"no room for 4 MB of temporary data \(No space"):
        Scratch(tmp_path).zeros((1 << 20,), torch.float32)
    Scratch(tmp_path).zeros((4,), torch.float32)  # small ones need no file


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, None])
def test_file_systems_that_cannot_reserve_will_do(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: int) -> None:
        assert code is not None
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", cannot, raising=False)
    stored = Scratch(tmp_path).zeros((1 << 20,), torch.float32)
    stored[-1] = 2
    assert float(stored.sum()) == 2

"""What a first start compiles ahead is what its launches ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from cvxq_kernels.gpu.compiling import compile_all, processes_for


@pytest.mark.slow
def test_launches_find_what_processes_compiled(tmp_path: Path) -> None:
    """Repacking, expanding and the matvec of one matrix, for a GPU that is not there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiling_ahead.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    recorded, failed, made, anew, *_ = done.stdout.split()
    assert int(recorded) == int(made) >= 3
    assert (failed, anew) == ("0", "0")


def test_a_kernel_that_cannot_be_compiled_hinders_nothing() -> None:
    """The launch meets the error again, and tells."""
    assert compile_all(["not a description", "{}"], 1) == 2


def test_a_process_that_ends_early_hinders_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was not asked for counts as failed, too; the system may end it for want of memory."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for _ in range(3):  # before it was written to, or after
        assert compile_all(["{}"] * 9, 2) == 9


def test_processes_are_at_most_as_many_as_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert [processes_for(["x"] * count) for count in (0, 1, 5, 20)] == [1, 1, 5, 8]

"""Runs the files `interpreted_*.py`: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

FILES = sorted(str(file) for file in Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.slow
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    said = run_interpreted("-m", "not gpu", *FILES)
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.gpu
def test_on_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert " passed" in done.stdout

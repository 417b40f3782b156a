"""What `--device` may say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cvxq.device import resolve_device
from cvxq.errors import ArgumentError, UnsupportedModelError


def test_the_cpu_needs_no_torch() -> None:
    code = (
        "import sys; from cvxq.device import resolve_device; resolve_device('cpu'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "mps", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"device is .*, allowed: cpu, cuda, cuda:N"):
        resolve_device(name)


def test_without_cuda_it_says_what_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedModelError) as caught:
        resolve_device("cuda")
    assert str(caught.value) == (
        f"PyTorch {torch.__version__} finds no CUDA device here; use --device cpu, or install a "
        "CUDA build of PyTorch on a machine with an NVIDIA GPU"
    )


def test_a_number_that_no_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("cuda") == "cuda:1"
    assert resolve_device("cuda:0") == "cuda:0"
    with pytest.raises(ArgumentError, match="device is 'cuda:2', allowed: cuda:0 to cuda:1"):
        resolve_device("cuda:2")

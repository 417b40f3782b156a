"""Where kernels may be launched before the one before them has ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from cvxq_kernels.gpu import overlap
from cvxq_kernels.gpu.overlap import early, overlaps

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    overlaps.cache_clear()
    yield
    overlaps.cache_clear()


def test_not_without_a_device() -> None:
    assert early(torch.device("cpu")) == {"OVERLAP": False}


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 9), False), ((9, 0), True), ((10, 0), True)]
)
def test_from_hopper_on(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert overlaps(DEVICE) == expected
    assert early(DEVICE) == (
        {"OVERLAP": True, "launch_pdl": True} if expected else {"OVERLAP": False}
    )


def test_not_with_a_triton_that_cannot_launch_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import compiler

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compiler, "CUDAOptions", SimpleNamespace(__dataclass_fields__={}))
    assert not overlap.overlaps(DEVICE)


def test_not_on_other_makers_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not overlaps(DEVICE)


def test_not_without_tritons_part_for_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.compiler", None)
    assert not overlaps(DEVICE)

"""What the kernels ask of a device, of one that is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cvxq_kernels.gpu import device

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_a_device_is_asked_about_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda of: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda of: "Fake H200")
    assert device.processors(CUDA) == 132
    assert device.capability(CUDA) == (9, 0)
    assert device.name_of(CUDA) == "Fake H200"
    assert (device.processors(CPU), device.name_of(CPU)) == (1, "cpu")


def test_the_median_is_of_actions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the device's, and what comes before an action does not count."""
    clock, costs = [0.0], iter([5.0, 1.0, 3.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    def spend(milliseconds: float) -> None:
        clock[0] += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = device.median_seconds(lambda: spend(next(costs)), lambda: spend(100.0), 3)
    assert found == pytest.approx(0.003)

"""The memory of a whole conversion against what its first line says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cvxq_converter.costs import Speed
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions

Save = Callable[..., Path]


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once that `work` allocated."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes, key=lambda item: item[0])]).max())


@pytest.mark.parametrize("calibration", ["none", "self"])
def test_peak_memory_stays_below_what_the_preflight_says(
    calibration: str, save_network: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvxq_converter.footprint._BASE_BYTES", 0)  # interpreter and libraries
    speed = Speed(1e11, 1e9, 1e-5)  # measuring it takes some megabytes itself
    monkeypatch.setattr("cvxq_converter.beginning.measure_speed", lambda *_: speed)
    folder = save_network("llama", hidden_size=128, intermediate_size=256, vocab_size=2048)
    lines: list[str] = []
    options = ConversionOptions.of(
        bits=4.0, calibration=calibration, sequences=4, length=16, gain=0.5
    )
    peak = peak_bytes(
        lambda: convert(str(folder), tmp_path / "a.cvxq", options, announce=lines.append)
    )
    found = re.search(r"([\d.]+) MB of memory", lines[0])
    assert found is not None
    stated = float(found[1]) * 1e6
    assert stated / 3 < peak <= stated

"""Conversions that were given a time: calibration and tuning share it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvxq_converter import amounts
from cvxq_converter.amounts import calibration_amount, tuning_steps
from cvxq_converter.job import convert, measure_model
from cvxq_converter.options import Calibration, ConversionOptions
from cvxq_converter.recheck import recalibrate
from cvxq_converter.source.checkpoint import open_source
from cvxq_format import CompandedTensor, Reader

Save = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")
TIME = 4.0  # seconds of the machine below


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nominal machine on which the tiny models take as long as usual ones do elsewhere."""
    monkeypatch.setattr(amounts, "CALIBRATION_SECONDS", 1.0)
    monkeypatch.setattr(amounts, "NOMINAL_FLOPS", 1.5e9)


def converted(folder: Path, path: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    """The line that was said first, and the options that the file tells."""
    lines: list[str] = []
    chosen = ConversionOptions.of(bits=3.0, group_size=16, gain=0.5, **options)
    convert(str(folder), path, chosen, announce=lines.append)
    with Reader(path) as reader:
        told: dict[str, Any] = json.loads(reader.file("provenance.json"))
    return lines[0], told


def packed(reader: Reader, name: str) -> Any:
    value = reader.read(name)
    return value.packed_codes if isinstance(value, CompandedTensor) else value.data


def test_calibration_and_tuning_take_what_was_given(save_network: Save, tmp_path: Path) -> None:
    folder, path = save_network("llama"), tmp_path / "a.cvxq"
    wanted = Calibration(time=TIME)
    source = open_source(str(folder))
    count, length = calibration_amount(source, "cpu", wanted)
    steps = tuning_steps(source, wanted)
    assert count >= 8
    assert 4 < steps < amounts.MOST_STEPS
    line, told = converted(folder, path, time=TIME)
    assert line.endswith(f"(calibration {count} × {length} tokens, {steps} steps of tuning)")
    assert told["options"]["tune"] == steps
    assert told["options"]["time"] == TIME
    assert recalibrate(str(folder), told).is_same
    spelled = tmp_path / "b.cvxq"
    converted(folder, spelled, sequences=count, length=length, tune=steps)
    with Reader(path) as mine, Reader(spelled) as other:
        assert mine.names == other.names
        for name in mine.names:
            assert np.array_equal(packed(mine, name), packed(other, name))


def test_steps_that_were_asked_for_stay(save_network: Save, tmp_path: Path) -> None:
    line, told = converted(save_network("llama"), tmp_path / "a.cvxq", time=TIME, tune=3)
    assert line.endswith(", 3 steps of tuning)")
    assert told["options"]["tune"] == 3


def test_nothing_is_tuned_that_memory_has_no_room_for(
    save_network: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvxq_converter.footprint.KEPT", 10**12)
    line, told = converted(save_network("llama"), tmp_path / "a.cvxq", time=TIME)
    assert "tuning" not in line
    assert told["options"]["tune"] == 0


def test_a_measurement_tunes_nothing(save_network: Save, tmp_path: Path) -> None:
    lines: list[str] = []
    options = ConversionOptions.of(bits=3.0, group_size=16, gain=0.5, time=TIME)
    path = tmp_path / "a.safetensors"
    record = measure_model(str(save_network("llama")), path, options, announce=lines.append)
    assert f"calibration {record.sequences} × {record.length} tokens)" in lines[0]


def test_the_default_tunes_too(save_network: Save, tmp_path: Path) -> None:
    folder = save_network("llama")
    steps = tuning_steps(open_source(str(folder)), Calibration())
    line, told = converted(folder, tmp_path / "a.cvxq")
    assert line.endswith(f", {steps} steps of tuning)")
    assert told["options"]["tune"] == steps > 0
    assert told["options"]["time"] is None


@pytest.mark.parametrize("said", [{"sequences": 8}, {"length": 32}, {"tune": 0}])
def test_who_says_how_much_there_is_says_so_of_tuning(
    save_network: Save, tmp_path: Path, said: dict[str, int]
) -> None:
    line, told = converted(save_network("llama"), tmp_path / "a.cvxq", **said)
    assert "tuning" not in line
    assert told["options"]["tune"] == 0

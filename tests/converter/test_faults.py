"""Runs that are killed, find no room or lose their model: nothing lost, one line, no half file."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cvxq_converter.job import convert, measure_model
from cvxq_converter.measure.measurement import load_measurement
from cvxq_converter.options import ConversionOptions
from cvxq_format import verify

Save = Callable[..., Path]
OLD = b"an older file"
KILLS = 2
OPTIONS = ConversionOptions.of(bits=4.0, group_size=16, sequences=3, length=12, gain=0.5)
LITTLE = ("--sequences", "3", "--length", "12")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has PyTorch loaded"),
]


def arguments(command: str, model: Path, output: Path) -> list[str]:
    bits = ("--bits", "4") if command == "convert" else ()
    return [command, str(model), "-o", str(output), *LITTLE, *bits]


def beside(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


@pytest.fixture(params=["convert", "measure"])
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def output(tmp_path: Path, command: str) -> Path:
    """The file to be written, of which an older version exists, alone in its folder."""
    name = "model.cvxq" if command == "convert" else "model.stats.safetensors"
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_bytes(OLD)
    return path


def is_whole(path: Path) -> bool:
    if path.suffix == ".cvxq":
        return not verify(path)
    return load_measurement(path).sequences.shape == (3, 12)


@pytest.mark.slow
def test_killed_at_any_moment(
    command: str, save_network: Save, output: Path, runs: Callable[..., Any]
) -> None:
    rng = Random(7)
    moments = [rng.uniform(0, 2) for _ in range(KILLS)]
    model = save_network("llama")
    one = runs(*arguments(command, model, output))
    for moment in moments:
        assert one("kill", moment)["code"] in (-9, 0)
        others = [name for name in beside(output) if name != output.name]
        assert all(name.endswith((".unfinished", ".journal")) for name in others)
        assert len(others) <= 2, "what an earlier run left is still there"
    assert output.read_bytes() == OLD or is_whole(output)
    last = one("run")
    assert last["code"] == 0, last["said"]
    assert beside(output) == [output.name]
    assert is_whole(output)


@pytest.mark.slow
def test_no_room_for_the_file(
    command: str, save_network: Save, output: Path, runs: Callable[..., Any]
) -> None:
    one = runs(*arguments(command, save_network("llama"), output))
    for size in (100, 9000):
        run = one("limit", size)
        assert run["code"] in (3, 6), run
        last = run["said"].splitlines()[-1]
        assert last.startswith("cvxq: ")
        assert "unexpected" not in last
        assert "Errno" not in last, "it says a number, not which file"
        assert set(beside(output)) <= {output.name, f"{output.name}.journal"}
        assert output.read_bytes() == OLD


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(
    command: str, save_network: Save, output: Path, runs: Callable[..., Any]
) -> None:
    one = runs(*arguments(command, save_network("llama"), output))
    output.parent.chmod(0o555)
    try:
        run = one("obey")
    finally:
        output.parent.chmod(0o755)
    assert run["code"] == 3, run
    assert "Permission denied" in run["said"].splitlines()[-1]
    assert run["said"].splitlines()[-1].startswith("cvxq: ")
    assert beside(output) == [output.name]
    assert output.read_bytes() == OLD


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    save_network: Save, tmp_path: Path, runs: Callable[..., Any]
) -> None:
    closed, model = tmp_path / "closed", save_network("llama")
    closed.mkdir(mode=0o555)
    for output, more in (
        (closed / "a.cvxq", ("--scratch", str(tmp_path))),
        (tmp_path / "a.cvxq", ("--report", str(closed / "deep" / "report"))),
    ):
        run = runs(*arguments("convert", model, output), *more)("obey")
        assert run["code"] == 3
        assert run["said"].count("\n") == 1, run
        assert f"Permission denied to write to {closed}; name another folder" in run["said"]
    assert sorted(tmp_path.iterdir()) == [closed]


@pytest.mark.slow
def test_two_at_once(
    command: str, save_network: Save, output: Path, runs: Callable[..., Any]
) -> None:
    """One of them is told of the other, or comes after it; the file is whole."""
    run = runs(*arguments(command, save_network("llama"), output))("twice")
    ended = sorted([run, run["other"]], key=lambda one: int(one["code"]))
    assert ended[0]["code"] == 0, ended
    last = ended[1]["said"].splitlines()[-1]
    assert ended[1]["code"] == 0 or "in use by another process" in last, ended
    assert beside(output) == [output.name]
    assert is_whole(output)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system")
def test_another_file_system(command: str, save_network: Save) -> None:
    output = Path("/dev/shm") / f"cvxq-test-{os.getpid()}.cvxq"
    try:
        make = convert if command == "convert" else measure_model
        make(str(save_network("llama")), output, OPTIONS)
        assert output.stat().st_size
        assert not list(output.parent.glob(f"{output.name}.*"))
    finally:
        output.unlink(missing_ok=True)


@pytest.mark.parametrize("stage", ["calibrate", "measure", "write"])
def test_a_model_that_vanishes(
    command: str, stage: str, save_network: Save, output: Path, tmp_path: Path
) -> None:
    """What is mapped stays; what is still to be opened is missed by name, and nothing is lost."""
    model = Path(shutil.copytree(save_network("llama"), tmp_path / "model"))

    def lose(current: str, done: int, total: int) -> None:
        if current == stage:
            for path in model.glob("*.safetensors"):
                path.unlink()

    make = convert if command == "convert" else measure_model
    try:
        make(str(model), output, OPTIONS, lose)
    except FileNotFoundError as error:
        assert Path(str(error.filename)).parent == model  # noqa: PT017 - or it is not missed
        assert output.read_bytes() == OLD
        assert {path.suffix for path in output.parent.iterdir()} <= {output.suffix, ".journal"}
    else:
        assert is_whole(output)

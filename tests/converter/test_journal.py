"""Steps that survive their process: found again, checked, computed where they are not."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter import beginning, result_file
from cvxq_converter import journal as module
from cvxq_converter.errors import ConversionError, CutShortError
from cvxq_converter.job import convert, measure_model
from cvxq_converter.journal import Journal, open_journal
from cvxq_converter.measure.measurement import load_measurement
from cvxq_converter.measure.quality import Divergence
from cvxq_converter.options import ConversionOptions

Save = Callable[..., Path]
JOB = {"model": "a", "bits": 3.0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write files for the shortest of steps, too."""
    monkeypatch.setattr(module, "SHORTEST", 0.0)


def never() -> Any:
    raise AssertionError("computed again")


def nobody(line: str) -> None:
    raise AssertionError(line)


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("keeps_everything")
def test_a_step_is_computed_once_whatever_its_result(tmp_path: Path) -> None:
    result = {
        "tensors": [torch.randn(3, 4).to(t) for t in (torch.bfloat16, torch.float64, torch.int64)],
        "odd": (torch.empty(0, 4), torch.tensor(2.5), torch.arange(6).view(2, 3).T),
        "arrays": [np.arange(12.0).reshape(3, 4), np.ones(3, bool), np.float32(1.5)],
        "record": Divergence(1.0, 2.0, 3, 4.0, np.ones((2, 2))),
        "plain": {(1, 2): None, "text": ["a", True]},
    }
    Journal(tmp_path).step("layers.0.weight", lambda: result)
    journal = Journal(tmp_path)
    found = journal.step("layers.0.weight", never)
    assert journal.step("layers.0.weight", never) is found
    for tensor, expected in zip(found["tensors"], result["tensors"], strict=True):
        assert tensor.dtype is expected.dtype
        assert torch.equal(tensor, expected)
    for tensor, expected in zip(found["odd"], result["odd"], strict=True):
        assert tensor.shape == expected.shape
        assert torch.equal(tensor, expected)
    for array, expected in zip(found["arrays"], result["arrays"], strict=True):
        assert array.dtype == expected.dtype
        assert np.array_equal(array, expected)
    assert found["record"] == result["record"]
    assert found["plain"] == result["plain"]


def test_what_takes_no_time_is_not_worth_a_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.step("short", lambda: 1) == journal.step("short", never)
    journal.step("chosen", lambda: 2, keep=True)
    assert [path.stem for path in tmp_path.iterdir()] == ["chosen"]


@pytest.mark.usefixtures("keeps_everything")
def test_what_was_put_and_what_was_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path).within("part")

    def compute() -> int:
        journal.put("beside", [1])
        return 2

    journal.step("whole", compute)
    assert Journal(tmp_path).kept() == ["part.beside", "part.whole"]
    journal.drop("beside", "what was never there")
    assert journal.step("beside", lambda: [3]) == [3]
    journal.within("x").step("y", lambda: 4)
    Journal(tmp_path).step("other", lambda: 5)
    Journal(tmp_path).within("part").keep_only("x")
    assert Journal(tmp_path).kept() == ["other", "part.x.y"]


@pytest.mark.usefixtures("keeps_everything")
@pytest.mark.parametrize("damage", ["truncated", "changed", "emptied", "of another kind"])
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: Path) -> None:
    Journal(tmp_path).step("a", lambda: torch.arange(1000))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "changed":
        data[200] ^= 1
        path.write_bytes(data)
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        path.rename(path.with_name("b" + path.suffix))
    journal = Journal(tmp_path)
    assert journal.step("a", lambda: torch.arange(7)).tolist() == [*range(7)]
    assert torch.equal(Journal(tmp_path).step("a", never), torch.arange(7))


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.usefixtures("keeps_everything")
def test_nothing_but_arrays_and_records_is_taken_from_a_file(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        checksum = result_file.dump(_Evil(), file)
    path = (tmp_path / "a").rename(tmp_path / f"a.{checksum:08x}")
    with pytest.raises(pickle.UnpicklingError, match="system"):
        result_file.load(path)
    assert Journal(tmp_path).step("a", lambda: "again") == "again"


def test_results_lie_in_files_not_in_memory(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    made = journal.step("large", lambda: torch.ones(1 << 20), keep=True)
    assert float(made.sum()) == 1 << 20
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert "large" in maps.read_text()


@pytest.mark.usefixtures("keeps_everything")
def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConversionError, match=r"no room for what is done .*--scratch"):
        Journal(tmp_path).step("a", lambda: 1)
    assert not [*tmp_path.iterdir()]


# --- jobs ---------------------------------------------------------------------------------------


def interrupted(folder: Path) -> list[str]:
    """Leave a journal of two steps behind; returns what was said."""
    lines: list[str] = []

    def work() -> None:
        with open_journal(folder, JOB, lines.append) as journal:
            journal.step("decided", lambda: 1, keep=True)
            journal.step("a", lambda: 2, keep=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    return lines


def test_a_finished_journal_is_removed_an_interrupted_one_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model.cvxq.journal"
    assert interrupted(folder) == [
        f"{folder} keeps what is done so far; the same command goes on from there"
    ]
    (folder / "b.123.part").write_bytes(b"what was being written")
    with open_journal(folder, JOB, nobody) as journal:
        assert journal.step("a", never) == 2
        assert {path.stem for path in folder.iterdir()} == {"job", "decided", "a"}
    assert not folder.exists()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, CutShortError, OSError, ConversionError])
def test_a_journal_is_kept_if_it_is_of_use(
    steps: int, error: type[BaseException], tmp_path: Path
) -> None:
    def fail() -> None:
        with open_journal(tmp_path / "j", JOB, lambda _: None) as journal:
            for step in range(steps):
                journal.step(f"{step}", lambda: 1, keep=True)
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "j").exists() == (steps > 1 and error is not ConversionError)


def test_another_jobs_journal_is_never_used(tmp_path: Path) -> None:
    interrupted(tmp_path / "j")
    lines: list[str] = []
    with open_journal(tmp_path / "j", {**JOB, "bits": 4.0}, lines.append) as journal:
        assert journal.step("a", lambda: 3) == 3
    assert lines == [f"{tmp_path / 'j'} is of another conversion (bits 3.0, not 4.0); removed"]
    interrupted(tmp_path / "j")
    (tmp_path / "j" / "job.json").write_text("{")
    with open_journal(tmp_path / "j", JOB, lines.append) as journal:
        assert journal.step("a", lambda: 4) == 4
    assert "its description is damaged" in lines[1]


def test_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "j")
    with open_journal(tmp_path / "j", JOB, nobody, anew=True) as journal:
        assert journal.step("a", lambda: 3) == 3


def test_two_processes_do_not_share_one(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    with (
        open_journal(folder, JOB, nobody),
        pytest.raises(ConversionError, match="j is in use by another process; wait for it"),
        open_journal(folder, JOB, nobody),
    ):
        raise AssertionError


# --- conversions --------------------------------------------------------------------------------


def options(**choices: Any) -> ConversionOptions:
    given = {"group_size": 16, "sequences": 4, "length": 12}
    return ConversionOptions.of(
        **{**given, **choices, **({} if "max_kl" in choices else {"bits": 4.0})}
    )


class Interrupting:
    """Lets every `each`-th file of a journal be the last one that is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: int) -> None:
        self.left = self.each = each
        write = Journal._write

        def write_less(journal: Journal, name: str) -> None:
            write(journal, name)
            self.left -= journal.folder is not None
            if not self.left:
                self.left = self.each
                raise KeyboardInterrupt

        monkeypatch.setattr(Journal, "_write", write_less)


@pytest.mark.usefixtures("keeps_everything")
@pytest.mark.parametrize(
    ("architecture", "choices", "each"),
    [
        ("llama-tied", {}, 9),
        ("opt", {"max_kl": 0.05}, 30),
        ("gpt2", {"iterations": 2}, 40),
        ("llama", {"tune": 4}, 20),
        ("llama", {"calibration": "copy"}, 20),
        ("llama", {"method": "rtn"}, 9),
    ],
)
def test_an_interrupted_conversion_ends_with_the_same_bytes(
    architecture: str,
    choices: dict[str, Any],
    each: int,
    save_network: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, chosen = str(save_network(architecture)), options(**choices)
    convert(folder, tmp_path / "expected.cvxq", chosen)
    Interrupting(monkeypatch, each)
    output, times = tmp_path / "found.cvxq", 0
    lines: list[str] = []
    while not output.exists():
        try:
            convert(folder, output, chosen, announce=lines.append)
        except KeyboardInterrupt:
            times += 1
            assert "the same command goes on" in lines[-1]
    assert times
    assert sum("goes on from" in line for line in lines) >= times
    assert output.read_bytes() == (tmp_path / "expected.cvxq").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"expected.cvxq", "found.cvxq"}


@pytest.mark.usefixtures("keeps_everything")
def test_an_interrupted_measurement_ends_with_the_same_bytes(
    save_network: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does a conversion that goes on from it, for which the Hessians are made in a pass."""
    folder, chosen = str(save_network("llama-tied")), options()
    direct, file = tmp_path / "direct.cvxq", tmp_path / "a.safetensors"
    convert(folder, direct, chosen)
    measure_model(folder, tmp_path / "expected.safetensors", chosen)
    Interrupting(monkeypatch, 25)
    times = 0
    while not file.exists():
        try:
            measure_model(folder, file, chosen)
        except KeyboardInterrupt:
            times += 1
    assert file.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    while not (tmp_path / "reused.cvxq").exists():
        try:
            measurement = load_measurement(file)
            convert(folder, tmp_path / "reused.cvxq", chosen, measurement=measurement)
        except KeyboardInterrupt:
            times += 1
    assert (tmp_path / "reused.cvxq").read_bytes() == direct.read_bytes()
    assert times >= 4


@pytest.mark.usefixtures("keeps_everything")
def test_what_was_decided_holds_when_less_is_free(
    save_network: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = str(save_network("llama")), tmp_path / "a.cvxq"
    convert(folder, tmp_path / "expected.cvxq", options())
    Interrupting(monkeypatch, 12)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, output, options())
    monkeypatch.undo()
    monkeypatch.setattr(beginning, "fits_memory", lambda plan, _: "copy" in plan.line())
    lines: list[str] = []
    convert(folder, output, options(), announce=lines.append)
    assert any("goes on from" in line for line in lines)
    assert output.read_bytes() == (tmp_path / "expected.cvxq").read_bytes()


@pytest.mark.usefixtures("keeps_everything")
def test_another_model_or_option_begins_anew(
    save_network: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, kept = tmp_path / "a.cvxq", tmp_path / "a.cvxq.journal"
    Interrupting(monkeypatch, 12)
    with pytest.raises(KeyboardInterrupt):
        convert(str(save_network("llama")), output, options())
    monkeypatch.undo()
    monkeypatch.setattr(module, "SHORTEST", 0.0)
    for folder, choices, resume, told in (
        ("llama", {"seed": 1}, True, "(seed 0, not 1); removed"),
        ("gpt2", {}, True, "(another model); removed"),
        ("llama", {}, False, None),
    ):
        copy = shutil.copytree(kept, tmp_path / "copy")
        model, chosen, lines = str(save_network(folder)), options(**choices), list[str]()
        convert(model, tmp_path / "expected.cvxq", chosen)
        convert(model, output, chosen, announce=lines.append, resume=resume)
        assert output.read_bytes() == (tmp_path / "expected.cvxq").read_bytes()
        assert not any("goes on" in line for line in lines)
        assert any((told or "removed") in line for line in lines) == (told is not None)
        copy.rename(kept)


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has PyTorch loaded")
def test_killed_processes_leave_what_the_next_one_goes_on_from(
    save_network: Save, tmp_path: Path, runs: Callable[..., Any]
) -> None:
    folder, output = save_network("llama-tied"), tmp_path / "found.cvxq"
    convert(str(folder), tmp_path / "expected.cvxq", options())
    amounts = ("--bits", "4", "--group-size", "16", "--sequences", "4", "--length", "12")
    one = runs("convert", folder, "-o", output, *amounts, "--threads", "1")
    for last, found in ((6, None), (12, "measured"), (8, "measured 100%"), (-1, "of 15 matrices")):
        done = one("last", last)
        assert done["code"] == (0 if last < 0 else -signal.SIGKILL), done["said"]
        assert found is None or found in done["said"]
    assert output.read_bytes() == (tmp_path / "expected.cvxq").read_bytes()
    assert not output.with_name("found.cvxq.journal").exists()

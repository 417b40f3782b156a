"""Exports that are killed or find no room: nothing half done, and nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cvxq.export import export, export_rest
from cvxq_format.unfinished import UnfinishedFolder

KILLS = 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that is loaded")
Runs = Callable[..., Callable[..., dict[str, Any]]]


@pytest.fixture
def model_file(make_file: Callable[..., Any], plain_tokenizer: dict[str, bytes]) -> Path:
    """Return a file with tensors that are not packed, more than any other file of its folder."""
    return Path(make_file("gpt2", files=plain_tokenizer, with_record=True).path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder to be written, alone in its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def said_in_one_line(run: dict[str, Any]) -> str:
    assert run["code"] == 3, run
    assert run["said"].count("\n") == 1, run
    assert run["said"].startswith("cvxq: ")
    assert "unexpected" not in run["said"]
    return str(run["said"])


def test_an_export_that_is_killed_at_any_moment(model_file: Path, folder: Path, runs: Runs) -> None:
    one, rng = runs("export", model_file, folder), Random(7)
    whole = one("run")
    assert whole["code"] == 0, whole["said"]
    expected, killed = contents(folder), 0
    shutil.rmtree(folder)
    for _ in range(KILLS):
        killed += one("kill", rng.uniform(0, whole["seconds"]))["code"] == -9
        left = [path for path in folder.parent.iterdir() if path != folder]
        assert len(left) <= 1, "what an earlier run left is still there"
        assert all(re.fullmatch(r"model\.[0-9a-f]{8}\.unfinished", path.name) for path in left)
        for path in left:
            os.utime(path, (0, 0))  # an empty one could be just made, for a minute
        if folder.exists():
            assert contents(folder) == expected
            shutil.rmtree(folder)
    assert killed > KILLS // 2
    assert one("run")["code"] == 0
    assert [*folder.parent.iterdir()] == [folder]
    assert contents(folder) == expected


def test_an_export_without_room(model_file: Path, folder: Path, runs: Runs) -> None:
    one = runs("export", model_file, folder)
    written = set()
    for size in (0, 100, 500, 2000, 4000):
        line = said_in_one_line(one("limit", size))
        assert "File too large" in line  # a limit of files' sizes is what a test can set
        written.add(line.partition(".unfinished/")[2].partition(":")[0])
        assert [*folder.parent.iterdir()] == []
    assert "unquantized.safetensors" in written
    assert len(written) > 1
    assert "" not in written, "a message without the file"


def test_an_export_into_a_folder_that_cannot_be_written(
    model_file: Path, folder: Path, runs: Runs
) -> None:
    folder.parent.chmod(0o555)
    try:
        line = said_in_one_line(runs("export", model_file, folder)("obey"))
    finally:
        folder.parent.chmod(0o755)
    assert "out/model." in line
    assert "Permission denied" in line
    assert [*folder.parent.iterdir()] == []


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system")
def test_an_export_to_another_file_system(model_file: Path, tmp_path: Path, runs: Runs) -> None:
    elsewhere = Path("/dev/shm") / f"cvxq-test-{os.getpid()}"
    elsewhere.mkdir()
    try:
        one = runs("export", model_file, elsewhere / "model")
        whole = contents(elsewhere / "model") if one("run")["code"] == 0 else {}
        assert whole["model.cvxq"] == model_file.read_bytes()
        shutil.rmtree(elsewhere / "model")
        said_in_one_line(one("limit", len(whole["model.cvxq"]) - 1))
        assert [*elsewhere.iterdir()] == []
    finally:
        shutil.rmtree(elsewhere)


def test_a_file_that_vanishes_while_it_is_exported(
    model_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(file: Path, made: Path) -> None:
        export_rest(file, made)
        file.unlink()

    monkeypatch.setattr("cvxq.export.export_rest", lose)
    with pytest.raises(FileNotFoundError) as lost:
        export(model_file, folder)
    assert lost.value.filename == str(model_file)
    assert [*folder.parent.iterdir()] == []


def test_what_another_process_is_exporting_stays(model_file: Path, folder: Path) -> None:
    other = UnfinishedFolder(folder)
    (other.path / "config.json").write_text("{}")
    export(model_file, folder)
    assert (other.path / "config.json").exists()
    with pytest.raises(OSError, match="not empty"):
        other.finish()
    other.abandon()
    assert [*folder.parent.iterdir()] == [folder]


def test_two_exports_at_once_give_one_whole_folder(model_file: Path, folder: Path) -> None:
    ended: list[str] = []

    def run() -> None:
        try:
            export(model_file, folder)
            ended.append("written")
        except Exception as error:
            ended.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended.count("written") == 1, ended
    assert all("not empty" in text or "empty folder" in text for text in ended if text != "written")
    assert [*folder.parent.iterdir()] == [folder]
    assert contents(folder)["model.cvxq"] == model_file.read_bytes()

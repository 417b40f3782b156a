"""What a process leaves that is killed while it writes, and who removes it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvxq_format import Codebook, CompandedTensor, Reader, Writer, verify
from cvxq_format.unfinished import Unfinished, disk_error, temporary_folder, write_whole

OLD = b"an older file"
WRITE = """
import sys, time
from pathlib import Path
from cvxq_format.unfinished import Unfinished
made = Unfinished(Path(sys.argv[1]))
made.file.write(b"some")
made.file.flush()
print(made.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "out" / "model.cvxq"
    path.parent.mkdir()
    path.write_bytes(OLD)
    return path


def start(target: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that writes, and return it with its unfinished file."""
    command = [sys.executable, "-c", WRITE, str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_the_next_run_removes_what_a_killed_one_left(target: Path) -> None:
    process, left = start(target)
    assert left.name.startswith("model.cvxq.")
    assert left.suffix == ".unfinished"
    end(process)
    assert left.exists()
    made = Unfinished(target)
    assert not left.exists()
    made.file.write(b"whole")
    made.finish()
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


def test_what_another_process_is_writing_stays(target: Path) -> None:
    process, other = start(target)
    made = Unfinished(target)
    assert other.exists()
    made.abandon()
    end(process)
    assert target.read_bytes() == OLD


def test_other_targets_are_left_alone(target: Path) -> None:
    others = [target.parent / name for name in ("b.cvxq.1.unfinished", "model.cvxq.unfinished.txt")]
    for other in others:
        other.write_bytes(b"x")
    Unfinished(target).abandon()
    assert all(other.exists() for other in others)


def write_some(target: Path, random_companded: Callable[..., CompandedTensor]) -> None:
    with Writer(target, codebooks=[Codebook.default()]) as writer:
        writer.add_file("config.json", b"{}" * 100)
        writer.add_companded("a", random_companded((24, 16), 1))
        writer.add_raw("b", np.ones(5, np.float32))


class FailingFile:
    """A file whose n-th write finds no room, and none after it does."""

    def __init__(self, file: Any, left: int) -> None:
        self._file, self.left = file, left

    def write(self, data: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_no_room_at_any_write(
    target: Path,
    random_companded: Callable[..., CompandedTensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, allowed = Unfinished.__init__, 0

    def limited(self: Unfinished, path: Path) -> None:
        make(self, path)
        self.file = FailingFile(self.file, allowed)  # type: ignore[assignment]

    monkeypatch.setattr(Unfinished, "__init__", limited)
    while allowed < 100:
        try:
            write_some(target, random_companded)
            break
        except OSError:
            assert target.read_bytes() == OLD
            assert list(target.parent.iterdir()) == [target]
        allowed += 1
    assert 8 < allowed < 100
    assert verify(target) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_a_disk_that_is_full_is_told_with_the_file(target: Path) -> None:
    made = Unfinished(target)
    raw: Any = made.file.raw  # type: ignore[attr-defined]
    with type(raw)("/dev/full", "wb") as file, pytest.raises(OSError, match="/dev/full"):
        file.write(b"some")
    made.abandon()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(
    call: str,
    target: Path,
    random_companded: Callable[..., CompandedTensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_some(target, random_companded)
    monkeypatch.undo()
    assert target.read_bytes() == OLD
    assert list(target.parent.iterdir()) == [target]


def test_two_writers_of_one_file_leave_a_whole_one(
    target: Path, random_companded: Callable[..., CompandedTensor]
) -> None:
    first, second = Writer(target), Writer(target)
    first.add_raw("a", np.ones(3, np.float32))
    second.add_raw("b", np.ones(3, np.float32))
    second.close()
    assert verify(target) == []
    first.close()
    assert verify(target) == []
    assert list(target.parent.iterdir()) == [target]


def test_all_of_a_file_or_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_whole(target, b"newer")
    with monkeypatch.context() as changed:
        changed.setattr("cvxq_format.unfinished._Named.write", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(target, b"newest")
    assert target.read_bytes() == b"newer"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="folders stay where there are no such locks")
def test_the_next_one_removes_a_temporary_folder_that_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "cvxq-x.01234567.unfinished"
    left.mkdir()
    (left / "a").write_bytes(b"")
    with temporary_folder("cvxq-x") as first:
        assert not left.exists()
        assert first.stat().st_mode & 0o777 == 0o700
        (first / "a").write_bytes(b"")
        with temporary_folder("cvxq-x") as second:
            assert second != first
            assert (first / "a").exists(), "another process is at work there"
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_replaced_while_it_is_read(
    target: Path, random_companded: Callable[..., CompandedTensor]
) -> None:
    write_some(target, random_companded)
    with Reader(target) as reader:
        write_whole(target, b"another")
        assert reader.read("b").to_float32().tolist() == [1] * 5  # type: ignore[union-attr]
    assert target.read_bytes() == b"another"


def test_what_a_disk_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    for error in (
        OSError(errno.ENOSPC, "full"),
        RuntimeError("No space left on device (os error 28)"),
    ):
        found = disk_error(error, tmp_path)
        assert found is not None
        assert (found.errno, found.filename) == (errno.ENOSPC, str(tmp_path))
    for error in (OSError("no such tokenizer"), FileNotFoundError(2, "none"), ValueError("28")):
        assert disk_error(error, tmp_path) is None
    with pytest.raises(OSError, match="cvxq-x") as full, temporary_folder("cvxq-x"):
        raise OSError(errno.ENOSPC, "full")
    assert str(full.value.filename).endswith(".unfinished")

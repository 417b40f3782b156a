"""A file or a folder that is being written, beside the one that it is going to become.

Its name says what it is: model.cvxq.3f2a9c1b.unfinished.  Whoever writes it holds a lock on it, so
that the next run for the same target can tell what a killed process left behind from what another
process is writing, and removes the former.  On Windows, without such locks, folders stay.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".unfinished"
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_JUST_MADE = 60  # seconds in which an empty one may not have been locked yet


class _Named(io.FileIO):
    """A file whose errors say which one it is, that of a full disk for one."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = os.fspath(self.name)
            raise


class Unfinished:
    """An unfinished file: write to `file` or to `path`, then `finish` or `abandon`."""

    def __init__(self, target: Path) -> None:
        """Remove what killed processes left of `target`, and begin; raises OSError."""
        remove_left_behind(target)
        self.target = target
        self.path = target.with_name(f"{target.name}.{secrets.token_hex(4)}{SUFFIX}")
        self.file: BinaryIO = io.BufferedWriter(_Named(self.path, "xb"))
        _lock(self.file.fileno())

    @property
    def is_open(self) -> bool:
        """Whether it has been neither finished nor abandoned."""
        return not self.file.closed

    def finish(self) -> None:
        """Flush all of it to the disk, and put it in the target's place."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if fcntl is None:  # an open file cannot be renamed there
            self.file.close()
        self.path.replace(self.target)
        self.file.close()
        _sync_folder(self.target.parent)

    def abandon(self) -> None:
        """Remove it; the target stays as it was."""
        with contextlib.suppress(OSError):  # a disk that is full cannot take what is buffered
            self.file.close()
        self.path.unlink(missing_ok=True)


class UnfinishedFolder:
    """An unfinished folder: write into `path`, then `finish` or `abandon`."""

    def __init__(self, target: Path, mode: int = 0o777) -> None:
        """Remove what killed processes left of `target`, and begin; raises OSError."""
        remove_left_behind(target)
        self.target = target
        self.path = target.with_name(f"{target.name}.{secrets.token_hex(4)}{SUFFIX}")
        self.path.mkdir(mode)
        self._handle = None if fcntl is None else os.open(self.path, os.O_RDONLY)
        if self._handle is not None:
            _lock(self._handle)

    def finish(self) -> None:
        """Put it in the place of the target, which is not there, or an empty folder."""
        self.path.replace(self.target)
        self._unlock()
        _sync_folder(self.target.parent)

    def abandon(self) -> None:
        """Remove it, and whatever it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._handle is not None:
            os.close(self._handle)


def write_whole(target: Path, data: bytes) -> None:
    """Put a file of these bytes in the target's place, all of it or nothing; raises OSError."""
    made = Unfinished(target)
    try:
        made.file.write(data)
        made.finish()
    except BaseException:
        made.abandon()
        raise


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A folder of this user's alone for a while, among the system's temporary ones.

    name: what it is for. The next one of the same name removes what a killed process left.
    """
    made = UnfinishedFolder(Path(tempfile.gettempdir(), name), 0o700)
    try:
        yield made.path
    except OSError as error:
        if error.errno in _OF_THE_DISK and error.filename is None:
            error.filename = str(made.path)
        raise
    finally:
        made.abandon()


def disk_error(error: BaseException, path: Path) -> OSError | None:
    """Return what a disk refused at `path`, though a library says it in its own way, or None."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return OSError(number, os.strerror(number), str(path)) if number in _OF_THE_DISK else None


def remove_left_behind(target: Path) -> None:
    """Remove unfinished files and folders of `target` that no process is writing."""
    for path in target.parent.glob(f"{glob.escape(target.name)}.*{SUFFIX}"):
        with contextlib.suppress(OSError):
            (_remove_folder if path.is_dir() else _remove_file)(path)


def _remove_file(path: Path) -> None:
    with path.open("rb+") as file:
        state = os.fstat(file.fileno())
        if _lock(file.fileno()) and (state.st_size or _is_old(state)):
            path.unlink()


def _remove_folder(path: Path) -> None:
    if fcntl is None:
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        if _lock(handle) and (any(path.iterdir()) or _is_old(os.fstat(handle))):
            shutil.rmtree(path)
    finally:
        os.close(handle)


def _is_old(state: os.stat_result) -> bool:
    return time.time() - state.st_mtime > _JUST_MADE


def _lock(handle: int) -> bool:
    """Lock a file or a folder until it is closed; False where another process has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

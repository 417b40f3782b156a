"""Finished steps of a long job, kept in files, so that the same job goes on where it ended.

A step is a name and what computes its result. Its file is written under another name first, and the
name that it gets then holds the checksum of its bytes: what is there and agrees is complete, and
whatever else is there is computed again. So a job needs to know nothing of interruptions. It asks
for its steps; those that are there cost nothing, and ask for no other.

Results are mapped from their files (`result_file`), so that they need no memory of their own.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from cvxq_converter.errors import ConversionError, CutShortError
from cvxq_converter.ranks import ALONE, Ranks
from cvxq_converter.result_file import dump, load
from cvxq_converter.stages import Done

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SHORTEST = 0.05  # seconds of a step that is worth a file
_JOB = "job.json"  # what the steps are of
_UNFINISHED = ".part"
_DIGEST = 64  # characters, which say nothing to people
Result = TypeVar("Result")


class Journal:
    """The results of steps by name: from the job's own earlier asking, from a file, or computed.

    folder: where the files are; None for a journal that forgets everything with its process.
    ranks: the processes that come to these steps together. Each step is there for all of them or
    for none, and what one of them has computed is handed round, by its file.
    """

    def __init__(self, folder: Path | None = None, ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks = folder, ranks
        self._prefix = ""
        self._results: dict[str, Any] = {}
        self._waiting: list[str] = []  # for the step that they were put by
        self._files: dict[str, Path] = {}
        for path in sorted(folder.iterdir()) if folder else ():
            if path.name != _JOB and path.suffix != _UNFINISHED:
                self._files[path.stem] = path

    def within(self, prefix: str) -> Journal:
        """The same journal for steps that share a prefix, whose names go without it."""
        part = Journal(ranks=self.ranks)
        part.folder, part._prefix = self.folder, f"{self._prefix}{prefix}."
        part._results, part._files, part._waiting = self._results, self._files, self._waiting
        return part

    def own(self) -> Journal:
        """The same journal for steps of this process alone."""
        if self.ranks.world == 1:
            return self
        part = self.within(f"rank {self.ranks.rank} of {self.ranks.world}")
        part.ranks = ALONE
        return part

    def step(
        self,
        name: str,
        compute: Callable[[], Result],
        *,
        keep: bool = False,
        together: bool = False,
    ) -> Result:
        """The result of a step; whoever gets it leaves it as it is.

        keep: though it took no time, since it might not come out the same again. together: all
        ranks compute it, since they come to further steps on the way; else the first one does.
        """
        name = self._prefix + name
        if name not in self._results and self._missing([name]):
            if self.ranks.is_first:
                self._compute(name, compute, keep)
            elif together:
                compute()
                self._write_waiting()
            self._hand_round({name: 0})
        found: Result = self._results[name]
        return found

    def each(
        self,
        names: Sequence[str],
        compute: Sequence[Callable[[], Result]],
        done: Done | None = None,
    ) -> Iterator[Result]:
        """Yield the results of steps that know nothing of each other, which the ranks divide.

        compute: of each, for which no step is computed that is not there. done: is told how many
        are, and of how many.
        """
        full = [self._prefix + name for name in names]
        ways = dict(zip(full, compute, strict=True))
        missing, world = self._missing(full), self.ranks.world
        if world > 1:
            for k in range(self.ranks.rank, len(missing), world):
                self._compute(missing[k], ways[missing[k]], keep=False)
                if done is not None:
                    done(min(len(full), len(full) - len(missing) + k + world), len(full))
            self._hand_round({name: k % world for k, name in enumerate(missing)})
        for n, name in enumerate(full):
            if name not in self._results:
                self._compute(name, ways[name], keep=False)
            yield self._results[name]
            if done is not None and world == 1:
                done(n + 1, len(full))

    def lacking(self, names: Sequence[str]) -> list[str]:
        """Those of the steps that are not there yet."""
        found = self._missing([self._prefix + name for name in names])
        return [name.removeprefix(self._prefix) for name in found]

    def put(self, name: str, result: object) -> None:
        """Keep what was computed on the way to another step, if that is kept."""
        self._results[self._prefix + name] = result
        self._waiting.append(self._prefix + name)

    def drop(self, *names: str) -> None:
        """Give up what no later step needs."""
        for name in names:
            self._results.pop(self._prefix + name, None)
            self._forget(self._prefix + name)
        self._waiting[:] = [name for name in self._waiting if name in self._results]

    def keep_only(self, prefix: str | None) -> None:
        """Give up all steps, but for those within a prefix if one is given."""
        for name in {*self._results, *self._files}:
            own = name.removeprefix(self._prefix) if name.startswith(self._prefix) else None
            if own is not None and (prefix is None or not own.startswith(f"{prefix}.")):
                self.drop(own)

    def kept(self) -> list[str]:
        """The names of all steps that lie in files."""
        return [*self._files]

    def _missing(self, names: list[str]) -> list[str]:
        """Those that are neither in memory nor in files, of this or of other ranks."""
        names = [name for name in names if name not in self._results]
        for name in names:
            if name in self._files:
                self._read(name)
        found = self.ranks.gather([name in self._results for name in names])
        who = {name: [has[n] for has in found] for n, name in enumerate(names)}
        self._hand_round({name: has.index(True) for name, has in who.items() if any(has)})
        return [name for name, has in who.items() if not any(has)]

    def _compute(self, name: str, compute: Callable[[], Any], keep: bool) -> None:
        started = time.monotonic()
        self._results[name] = compute()
        if keep or self.ranks.world > 1 or time.monotonic() - started >= SHORTEST:
            self._write_waiting()
            self._write(name)

    def _write_waiting(self) -> None:
        while self._waiting:
            self._write(self._waiting.pop(0))

    def _hand_round(self, owners: Mapping[str, int]) -> None:
        """Let all ranks have what one of them has, by the number of that one."""
        ranks, folder = self.ranks, self.folder
        if ranks.world == 1 or not owners:
            return
        assert folder is not None
        mine = {n: self._files[n].name for n, owner in owners.items() if owner == ranks.rank}
        told = ranks.gather(mine)
        files = {name: folder / told[owner][name] for name, owner in owners.items()}
        for name, path in files.items():  # in a folder that they share
            self._take(name, path)
        known = ranks.gather([name in self._results for name in files])
        for n, (name, path) in enumerate(files.items()):
            if not all(has[n] for has in known):
                ranks.send_file(path, owners[name])
                self._take(name, path)
        ranks.gather(None)  # whoever goes on may drop what the others were still to read

    def _take(self, name: str, path: Path) -> None:
        if name not in self._results and path.exists():
            self._files[name] = path
            self._read(name)

    # --- files ----------------------------------------------------------------------------------

    def _write(self, name: str) -> None:
        if self.folder is None:
            return
        self._forget(name)
        unfinished = self.folder / f"{name}.{os.getpid()}{_UNFINISHED}"
        try:
            with unfinished.open("wb") as file:
                checksum = dump(self._results[name], file)
                file.flush()
                os.fsync(file.fileno())
            self._files[name] = unfinished.rename(self.folder / f"{name}.{checksum:08x}")
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                error.filename, error.filename2 = str(unfinished), None
                raise
            raise CutShortError(
                f"{self.folder}: no room for what is done so far ({error.strerror}); "
                "use another folder (--scratch)"
            ) from None
        self._read(name)  # from now on it lies in the file, not in memory

    def _read(self, name: str) -> None:
        path = self._files[name]
        try:
            self._results[name] = load(path)
        except Exception:  # whatever a damaged file makes of being read
            self._forget(name)

    def _forget(self, name: str) -> None:
        path = self._files.pop(name, None)
        if path is not None:
            path.unlink(missing_ok=True)


@contextmanager
def open_journal(
    folder: Path,
    job: Mapping[str, Any],
    say: Callable[[str], None],
    anew: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Journal]:
    """The journal of a job, removed when the job is done or refused and kept when it is cut short.

    job: JSON values, all that the results depend on. What `folder` holds of another job is removed,
    and with `anew` what it holds of this one. say: takes a line about what was found or is left.
    ranks: of which the first on a machine does so there.
    Raises ConversionError while another process has the folder.
    """
    lock = _locked(folder) if ranks.is_first else None
    try:
        # Where machines share a folder, the others find what the first rank has made of it.
        for prepares in (ranks.is_first, ranks.local == 0 and not ranks.is_first):
            if prepares:
                _prepare(folder, job, say, anew)
            ranks.gather(None)
        journal = Journal(folder, ranks)
        try:
            yield journal
            ranks.gather(None)
        except BaseException as error:
            # A refusal is final: the same command would come to it again.
            is_final = isinstance(error, ConversionError) and not isinstance(error, CutShortError)
            if not ranks.is_first:
                raise
            if is_final or len(journal.kept()) <= 1:  # what was decided at the start
                shutil.rmtree(folder)
            else:
                say(f"{folder} keeps what is done so far; the same command goes on from there")
            raise
        if ranks.local == 0:
            shutil.rmtree(folder, ignore_errors=not ranks.is_first)
    finally:
        if lock is not None:
            os.close(lock)


def _prepare(folder: Path, job: Mapping[str, Any], say: Callable[[str], None], anew: bool) -> None:
    """Leave nothing in a folder but finished steps of this job."""
    folder.mkdir(mode=0o700, exist_ok=True)
    other = _difference(folder, job)
    if other and not anew:
        say(f"{folder} is of another conversion ({other}); removed")
    for path in folder.iterdir():
        if other or anew or path.suffix == _UNFINISHED:
            path.unlink()
    described = folder / _JOB
    if not described.exists():
        try:
            described.write_text(json.dumps(job, sort_keys=True))
        except OSError as error:  # of a disk that is full: say which, and leave no half of it
            described.unlink(missing_ok=True)
            error.filename = str(described)
            raise


def _locked(folder: Path) -> int | None:
    """Make the folder unless it is there, and keep other processes out until this is closed.

    None on Windows, where nobody is kept out.
    """
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        if fcntl is None:
            return None
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConversionError(
                f"{folder} is in use by another process; wait for it, or choose another --output"
            ) from None
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # of a folder that its process has just removed


def bytes_in(folder: Path) -> int:
    """What a journal's files take, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def _difference(folder: Path, job: Mapping[str, Any]) -> str | None:
    """In what the job whose steps a folder holds differs; None if it does not, or holds none."""
    path = folder / _JOB
    if not path.is_file():
        return None if not any(folder.iterdir()) else "of which it does not say which"
    try:
        found = json.loads(path.read_bytes())
        before, now = _flat(found), _flat(json.loads(json.dumps(job)))
    except (ValueError, AttributeError):
        return "its description is damaged"
    for name, value in now.items():
        if before.get(name) != value:
            is_digest = isinstance(value, str) and len(value) == _DIGEST
            return f"another {name}" if is_digest else f"{name} {before.get(name)}, not {value}"
    return None


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat

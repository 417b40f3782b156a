"""Cases in child processes, forked from a warm one, with limits of time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.trials import Verdict

SECONDS = 20
MEMORY = 512 << 20  # beside the file's own size
_ASLEEP = 5  # seconds between two looks, which are one apart at most
_PAGE = resource.getpagesize()

Case = Callable[[int], tuple[str, bytes]]
Kind = Callable[[int], str]
Trial = Callable[[Path, int], Verdict]


class Result(NamedTuple):
    """One case: its number, the kinds of its mutations, how it ended, seconds."""

    number: int
    kind: str
    verdict: Verdict
    seconds: float


class _Worker:
    """A child that works through cases in turn."""

    def __init__(self, indices: list[int], case: Case, trial: Trial, limited: bool) -> None:
        context = multiprocessing.get_context("fork")
        self.indices = indices
        self.folder = Path(tempfile.mkdtemp(prefix="cvxq-fuzz-"))
        self.pipe, theirs = context.Pipe(duplex=False)
        arguments = (theirs, self.folder, indices, case, trial, limited)
        self.process: BaseProcess = context.Process(target=_work, args=arguments)
        self.process.start()
        theirs.close()
        self.began, self.waited = time.monotonic(), self._waited()

    def take(self, result: Result) -> None:
        self.indices.remove(result.number)
        self.began, self.waited = time.monotonic(), self._waited()

    @property
    def is_late(self) -> bool:
        spent = time.monotonic() - self.began
        return spent > SECONDS and spent - (self._waited() - self.waited) > SECONDS

    def _waited(self) -> float:
        """Seconds in which it could have run, while others had the processors."""
        try:
            return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError):
            return 0.0

    def end(self) -> str:
        """Stop the child; return why it did not come to its end, and its last words."""
        if self.is_late and self.process.is_alive():
            self.process.kill()
            self.process.join()
            how = f"took more than {SECONDS} s"
        else:
            self.process.join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exited with {code}"
        words = (self.folder / "stderr").read_text(errors="replace")[-3000:]
        shutil.rmtree(self.folder)
        self.pipe.close()
        return f"{how}\n{words}".strip()


def run_cases(
    indices: range,
    batch: int,
    jobs: int,
    case: Case,
    kind: Kind,
    trial: Trial,
    limited: bool = True,
) -> Iterator[Result]:
    """Yield the results of all cases, as they come; limited: in memory, too."""
    batches = [list(indices[start : start + batch]) for start in range(0, len(indices), batch)]
    batches.reverse()
    workers: list[_Worker] = []
    looked = time.monotonic()
    while batches or workers:
        while batches and len(workers) < jobs:
            workers.append(_Worker(batches.pop(), case, trial, limited))
        ready = wait([worker.pipe for worker in workers], timeout=1)
        now = time.monotonic()
        if now - looked > _ASLEEP:  # all of this was stopped for a while
            for worker in workers:
                worker.began += now - looked
        looked = now
        for worker in list(workers):
            if worker.pipe in ready:
                try:
                    result: Result = worker.pipe.recv()
                    worker.take(result)
                    yield result
                    continue
                except EOFError:
                    pass
            elif not worker.is_late:
                continue
            workers.remove(worker)
            why, rest = worker.end(), worker.indices
            if rest:  # the first of them is to blame
                yield Result(rest[0], kind(rest[0]), Verdict("found", why), float(SECONDS))
                if rest[1:]:
                    batches.append(rest[1:])


def _work(
    pipe: Connection, folder: Path, indices: list[int], case: Case, trial: Trial, limited: bool
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    errors = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    os.environ["TMPDIR"] = str(folder)
    for index in list(indices):
        kind, data = case(index)
        path = folder / f"case-{index}.cvxq"
        path.write_bytes(data)
        begin = time.monotonic()
        if limited:
            _limit_memory(len(data))
        verdict = trial(path, index)
        path.unlink()
        pipe.send(Result(index, kind, verdict, time.monotonic() - begin))


def _limit_memory(file_bytes: int) -> None:
    """Allow the addresses in use now, the file once, and `MEMORY`."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + file_bytes + MEMORY, hard))


def as_record(result: Result) -> dict[str, Any]:
    """Return a result as JSON types."""
    return {
        "case": result.number,
        "kind": result.kind,
        "outcome": result.verdict.outcome,
        "text": result.verdict.text,
        "seconds": round(result.seconds, 3),
    }

"""`--ranks N`: further processes of the same command on this machine, and what becomes of them."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvxq_converter.ranks import Ranks

_LOOK = 0.1  # seconds between two looks at the others
_GRACE = 2.0  # seconds in which it shows who ended first


def ranks_here(count: int | None) -> int:
    """How many processes of this job share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count or 1))


@contextmanager
def together(count: int | None) -> Iterator[Ranks]:
    """Work with `count` processes on this machine, or with those that the environment tells of.

    This process is the first one, the others run the same command. Raises ConversionError with the
    reason if one of them ends before this one does.
    """
    from cvxq_converter.ranks import join

    if "WORLD_SIZE" in os.environ or (count or 1) == 1:
        if "WORLD_SIZE" in os.environ and count:  # one of the others
            threading.Thread(target=_end_with_the_first, daemon=True).start()
        yield join()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "RANK": "0", "LOCAL_RANK": "0"}
    others, is_over = [_Other(rank) for rank in range(1, count or 1)], threading.Event()
    threading.Thread(target=_watch, args=(others, is_over), daemon=True).start()
    try:
        yield join()
    except (Exception, KeyboardInterrupt):
        is_over.set()
        _raise_reason(others)
        raise
    finally:
        is_over.set()
        for other in others:
            other.end()


class _Other:
    """Another process, in a session of its own: Ctrl-C is for the first one alone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cvxq.cli", *sys.argv[1:]],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,  # which closes when this process ends, however it does
            stdout=subprocess.DEVNULL,
            stderr=self.said,
            start_new_session=True,
        )

    def failed(self) -> bool:
        """Whether it has ended before its time."""
        return bool(self.process.poll())

    def reason(self) -> tuple[int, str]:
        """What it ended with, in one line, after how much that tells: less is more."""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").splitlines()
        told = [line.removeprefix("cvxq: ") for line in lines if line.startswith("cvxq: ")]
        if told:  # whatever the exit code is: connections that break may abort the process after it
            is_consequence = "another rank has ended" in told[-1]
            return 1 + is_consequence, f"ended: {told[-1]}"
        code = self.process.returncode
        ending = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
        return 0, ending

    def end(self) -> None:
        """Take it away if it is still there."""
        self.process.kill()
        self.process.wait()


def _watch(others: list[_Other], is_over: threading.Event) -> None:
    """Interrupt the first process when another one fails; it may be busy for long."""
    while not is_over.wait(_LOOK):
        if any(other.failed() for other in others):
            if not is_over.wait(_GRACE):
                _thread.interrupt_main()
            return


def _raise_reason(others: list[_Other]) -> None:
    """Raise ConversionError if it was for another process that this one could not go on."""
    from cvxq_converter.errors import ConversionError
    from cvxq_converter.ranks import LostRankError

    is_lost = isinstance(sys.exc_info()[1], LostRankError)
    until = time.monotonic() + (2 * _GRACE if is_lost else 0)
    while not any(other.failed() for other in others) and time.monotonic() < until:
        time.sleep(_LOOK)
    failed = [(other.reason(), other.rank) for other in others if other.failed()]
    if failed:
        (_, reason), rank = min(failed)
        raise ConversionError(
            f"rank {rank} {reason}; give the same command again, it goes on where it was"
        ) from None


def _end_with_the_first() -> None:
    """Wait until nobody holds the other end of stdin: the first process has ended."""
    with contextlib.suppress(OSError):
        sys.stdin.buffer.read()
    os._exit(1)

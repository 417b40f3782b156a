"""Decoding while other processes keep processors busy, on one thread and on several.

A busy process computes all the time, at the same priority. With threads that wait for each other,
one such process can cost more than half: whoever is off its processor holds up all the others.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpu_page import head, spread
from cpu_runs import Amount, measure_ours, measure_theirs, say
from peers.llamacpp import LlamaCpp

SETTLING = 0.5  # seconds until the system has spread busy processes over the processors
AIMS = {"alone": 1.0, "one busy process": 1.2, "one for each processor": 0.9}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes computing, until this one is gone at the latest."""
    work = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    command = [sys.executable, "-c", work]
    busy = [subprocess.Popen(command) for _ in range(count)]
    try:
        time.sleep(SETTLING if busy else 0)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def decode_speeds(
    ours: Path,
    theirs: Path | None,
    threads: int,
    rounds: int,
    amount: Amount,
    peer: LlamaCpp | None,
) -> dict[tuple[str, int], list[float]]:
    """Tokens/s of each program with 1 thread and with `threads`, all of them in every round."""
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for count in sorted({1, threads}):
            speed = measure_ours(ours, count, amount).decode
            found.setdefault(("cvxq", count), []).append(speed)
            if theirs is not None and peer is not None:
                speed = measure_theirs(theirs, count, peer, amount).decode
                found.setdefault(("llama.cpp", count), []).append(speed)
    return found


def load_page(
    ours: Path,
    theirs: Path | None,
    threads: int,
    rounds: int,
    amount: Amount,
    peer: LlamaCpp | None,
    machine: str,
) -> str:
    """A section: decoding at each load, and whether several threads pay there."""
    names = ["cvxq", *(["llama.cpp"] if theirs is not None and peer is not None else [])]
    columns = [f"{name}, {n} threads" for name in names for n in (1, threads)]
    rows, judged = [], []
    loads = zip(AIMS, (0, 1, os.cpu_count() or 1), strict=True)
    for load, count in loads:
        say(f"decoding {load}")
        with busy_processes(count):
            found = decode_speeds(ours, theirs, threads, rounds, amount, peer)
        cells = [spread(found[name, n], ".1f") for name in names for n in (1, threads)]
        rows.append(f"| {load} | {' | '.join(cells)} |")
        gain = statistics.median(found["cvxq", threads]) / statistics.median(found["cvxq", 1])
        verdict = "met" if gain >= AIMS[load] else "**missed**"
        judged.append(
            f"- {load}: {threads} threads decode {gain:.2f} times as fast as one "
            f"(wanted {AIMS[load]}): {verdict}."
        )
    lines = [f"## Decoding beside busy processes: {ours.name}", "", f"{machine}. Tokens/s, medians"]
    lines[-1] += f" of {rounds} rounds ± their deviation, {amount.tokens} tokens each."
    return "\n".join([*lines, "", *head(["load", *columns]), *rows, "", *judged]) + "\n"

"""The most anonymous memory that a command and its children take, stage by stage.

    python benchmarks/peak.py cvxq convert MODEL -o model.cvxq --bits 4.25 --calibration text.txt

What lies in files and is mapped from there is not counted: the system takes that memory back when
it has use for it. Stages are those that the command names on stderr, which is passed on.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PAUSE = 0.05  # seconds between two looks
_STAGE = re.compile(rb"^(\w+): \d+/\d+")  # of `cvxq`'s progress


@dataclass
class Peaks:
    """Bytes by stage, in the order of their first looks, and what the command came to."""

    stages: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    code: int = 0

    @property
    def most(self) -> tuple[int, str]:
        """The most, and the stage in which that was."""
        return max((size, stage) for stage, size in self.stages.items())

    def line(self) -> str:
        """Say it in one line, for people."""
        size, stage = self.most
        each = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in self.stages.items())
        return f"{size / 1e9:.2f} GB ({stage}), {self.seconds:.0f} s; by stage: {each}"


def anonymous_bytes(pid: int) -> int:
    """Memory of a process and its children that lies in no file; 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return 0
    own = sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.M))
    return 1024 * own + sum(map(anonymous_bytes, children))


def peaks_of(command: list[str]) -> Peaks:
    """Run a command and watch it."""
    found, stage = Peaks(), ["start"]

    def pass_on(stderr: IO[bytes]) -> None:
        for line in stderr:
            named = _STAGE.match(line)
            if named:
                stage[0] = named[1].decode()
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()

    started = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=pass_on, args=(process.stderr,))
        reader.start()
        while process.poll() is None:
            now = stage[0]
            found.stages[now] = max(found.stages.get(now, 0), anonymous_bytes(process.pid))
            time.sleep(PAUSE)
        reader.join()
    found.seconds, found.code = time.perf_counter() - started, process.returncode
    return found


def main() -> int:
    """Run the command of the arguments; exit with its code."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    found = peaks_of(sys.argv[1:])
    print(found.line())
    return found.code


if __name__ == "__main__":
    sys.exit(main())

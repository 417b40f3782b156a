"""Many runs of a command that end early, forked from one process that has everything loaded.

    python tests/converter/faulty_runs.py KIND NUMBER... -- ARGUMENTS

KIND "kill": each run is killed after so many seconds. "limit": no file may grow past so many bytes.
Prints one JSON line per run: exit code (negative: signal), stderr, and the names beside the output.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from cvxq.cli.application import application


def run(kind: str, number: float, arguments: list[str]) -> tuple[int, str]:
    """Fork, run the command there, and return its exit code and what it said."""
    said, saying = os.pipe()  # no file: there may be no room in one
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(saying, 2)
        if kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
        try:
            application.main(arguments)
        except SystemExit as error:
            os._exit(int(error.code or 0))
    os.close(saying)
    if kind == "kill":
        time.sleep(number)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(said, encoding="utf-8", errors="replace") as lines:
        told = lines.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), told


def main() -> None:
    """Run as the command line says."""
    torch.set_num_threads(1)
    kind, *numbers = sys.argv[1 : sys.argv.index("--")]
    arguments = sys.argv[sys.argv.index("--") + 1 :]
    output = Path(arguments[arguments.index("-o") + 1])
    for number in numbers:
        code, said = run(kind, float(number), arguments)
        beside = sorted(path.name for path in output.parent.iterdir())
        print(json.dumps({"code": code, "said": said, "beside": beside}), flush=True)


main()

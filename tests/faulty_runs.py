"""Runs of a command that end early, forked from one process that has everything loaded.

    python tests/faulty_runs.py COMMAND

reads JSON lines, [how, number, the command's arguments]: "run" it; "obey" the permissions of files,
which root need not; "kill" it after so many seconds; or "limit" files to so many bytes.
Answers each with a JSON line: exit code (negative: signal), stderr, and seconds.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time

from cvxq.cli.application import application

CONVERTING = ("convert", "measure")


MODULES = {
    "serve": ("cvxq.lean.fast_codec", "cvxq.lean.native_decoder", "cvxq.serve.run"),
    "export": ("cvxq.export",),
    "push": ("cvxq.card", "cvxq.export", "cvxq.hub", "cvxq.summary", "huggingface_hub.hf_api"),
}


def load(command: str) -> None:
    """Import what a command would import anew in every run."""
    if command in CONVERTING:
        import torch

        torch.set_num_threads(1)
    for name in MODULES.get(command, ()):
        importlib.import_module(name)


def run(how: str, number: float, arguments: list[str]) -> dict[str, object]:
    """Fork, run the command there, and return how it ended."""
    said, saying = os.pipe()  # no file: there may be no room in one
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(saying, 2)
        if how == "obey":
            obey_permissions()
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
        try:
            application.main(arguments)
        except SystemExit as error:
            os._exit(int(error.code or 0))
    os.close(saying)
    if how == "kill":
        time.sleep(number)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(said, encoding="utf-8", errors="replace") as lines:
        told = lines.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "said": told, "seconds": time.monotonic() - began}


def obey_permissions() -> None:
    """Give up root's power to write where permissions forbid it."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version of the call, this process
    none = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None).capset(header, none):
        raise OSError("capset failed")


def main() -> None:
    """Run as the lines of stdin say."""
    command = sys.argv[1]
    load(command)
    for line in sys.stdin:
        how, number, arguments = json.loads(line)
        print(json.dumps(run(how, number, [command, *arguments])), flush=True)


if __name__ == "__main__":
    main()

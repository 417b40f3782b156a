"""Runs of a command that end early, forked from one process that has everything loaded.

    python tests/faulty_runs.py COMMAND

reads JSON lines, [how, number, the command and its arguments]: "run" it; "twice" at once; "obey"
the permissions of files, which root need not; "kill" it after so many seconds; "limit" files to so
many bytes; or let the file of its journal with this number be the "last" thing that it writes.
Answers each with a JSON line: exit code (negative: signal), stderr, and seconds; of the second run
at once as "other". What COMMAND imports is loaded once; `measure` needs what `convert` does.
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

MODULES = {
    "convert": (
        "cvxq_converter.job",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
    ),
    "serve": ("cvxq.lean.fast_codec", "cvxq.lean.native_decoder", "cvxq.serve.run"),
    "export": ("cvxq.export",),
    "push": ("cvxq.card", "cvxq.export", "cvxq.hub", "cvxq.summary", "huggingface_hub.hf_api"),
}


def load(command: str) -> None:
    """Import what a command would import anew in every run."""
    if command == "convert":
        import torch

        torch.set_num_threads(1)
    for name in MODULES.get(command, ()):
        importlib.import_module(name)


def run(how: str, number: float, arguments: list[str]) -> dict[str, object]:
    """Fork, run the command there, and return how it ended."""
    began = time.monotonic()
    runs = [start(how, number, arguments) for _ in range(2 if how == "twice" else 1)]
    if how == "kill":
        time.sleep(number)
        os.kill(runs[0][0], signal.SIGKILL)
    first, *others = (wait(*one, began) for one in runs)
    return {**first, **({"other": others[0]} if others else {})}


def start(how: str, number: float, arguments: list[str]) -> tuple[int, int]:
    """Fork and run the command there; returns the child, and where to read what it says."""
    said, saying = os.pipe()  # no file: there may be no room in one
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(saying, 2)
        if how == "obey":
            obey_permissions()
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
        if how == "last":
            die_at_file(int(number))
        try:
            application.main(arguments)
        except SystemExit as error:
            os._exit(int(error.code or 0))
    os.close(saying)
    return child, said


def wait(child: int, said: int, began: float) -> dict[str, object]:
    """Return how a child ended."""
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


def die_at_file(number: int) -> None:
    """Be killed when the journal's file of this number has been written; every step has one."""
    from cvxq_converter import journal

    write, left = journal.Journal._write, number

    def write_or_die(self: journal.Journal, name: str) -> None:
        nonlocal left
        write(self, name)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal._write = write_or_die  # type: ignore[method-assign]
    journal.SHORTEST = 0.0


def main() -> None:
    """Run as the lines of stdin say."""
    load(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

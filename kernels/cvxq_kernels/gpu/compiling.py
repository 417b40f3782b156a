"""Compile kernels in several processes at once, before they are launched.

Triton compiles a kernel when it is first launched, one after the other: minutes for a model's
kernels.  Here the launches are gone through without being made (`recording`), what they would
compile is compiled by processes of their own, and the launches find it in Triton's cache on disk.
Such a process, `python -m cvxq_kernels.gpu.compiling`, reads a line for each kernel and writes one
when it is done; it needs no GPU, and holds none of its memory.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import IO, Any

MOST_PROCESSES = 8  # each takes some 400 MB of main memory


@contextmanager
def recording() -> Iterator[list[str]]:
    """Launch nothing meanwhile; give a line for each kernel that would have been compiled."""
    from triton import knobs

    found: dict[str, None] = {}

    def note(*, fn: Any, compile: Any, **_: Any) -> bool:
        line = {"module": fn.module, "name": fn.name, "what": compile["specialization_data"]}
        found[json.dumps(line)] = None
        return True  # it is taken care of

    before, sources = knobs.runtime.jit_cache_hook, []  # type: ignore[var-annotated]
    knobs.runtime.jit_cache_hook = note
    try:
        yield sources
    finally:
        knobs.runtime.jit_cache_hook = before
        sources += found


def processes_for(sources: Sequence[str]) -> int:
    """How many processes are worth it: one for each kernel, as there are processors."""
    return max(1, min(len(sources), os.cpu_count() or 1, MOST_PROCESSES))


def compile_all(sources: Sequence[str], processes: int) -> int:
    """Compile what `recording` gave; return for how many that failed, which the launch will tell.

    The deepest mixtures come first, since they take longest.  Where a process ends early, the
    others go on.
    """
    waiting: SimpleQueue[str] = SimpleQueue()
    for source in sorted(sources, key=len, reverse=True):
        waiting.put(source)
    with ThreadPoolExecutor(processes) as threads:
        failed = sum(threads.map(lambda _: _feed(waiting), range(processes)))
    return failed + waiting.qsize()


def _feed(waiting: SimpleQueue[str]) -> int:
    """Let a process compile one kernel after the other until none waits; count what failed."""
    command = [sys.executable, "-m", __name__]
    taken, done, answer = 0, 0, "ready"
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(Empty, BrokenPipeError):  # the last one, if the process is gone
            while answer:
                source = waiting.get_nowait()
                taken += 1
                process.stdin.write(source + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                done += answer == "done\n"
        with suppress(BrokenPipeError):
            process.stdin.close()
    return taken - done


def _compile(line: str) -> None:
    """Compile one kernel for the GPU that the line names."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    told = json.loads(line)
    what = json.loads(told["what"])
    kernel = getattr(importlib.import_module(told["module"]), told["name"])
    values = [v["constexpr"] if isinstance(v, dict) else v for v in what["constant_vals"]]
    constants = dict(zip(map(tuple, what["constant_keys"]), values, strict=True))
    attributes = dict(zip(map(tuple, what["attrs_keys"]), what["attrs_vals"], strict=True))
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in what["options"].items()}
    source = ASTSource(kernel, what["signature"], constants, attributes)
    compile(source, target=GPUTarget(**what["target"]), options=options)


def serve(lines: IO[str], answers: IO[str]) -> None:
    """Compile a kernel for each line; answer whether that went well."""
    for line in lines:
        try:
            _compile(line)
            answer = "done"
        except Exception as error:  # whatever it is: the launch meets it again, and tells
            answer = f"failed: {type(error).__name__}"
        answers.write(answer + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)

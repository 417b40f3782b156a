"""A chat template, rendered in a process of its own that is stopped when it takes too much.

One such process serves all templates, one text at a time; it starts with the first, or when told to
`begin`, and ends with this one.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from cvxq.errors import ChatError

SECONDS = 5  # for one text
MEMORY = 512 << 20  # bytes of addresses, those of the interpreter included
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from cvxq.template_program import main; main(float(sys.argv[2]), int(sys.argv[3]))"
)


class TemplateError(ChatError):
    """A chat template that refuses some messages, or fails on them, in its own words."""


class TemplateLimitError(TemplateError):
    """A chat template that takes too long, or ended its process."""


class Renderer:
    """The process, started when asked for the first time and again after it ended.

    seconds: that a text may take; memory: bytes that the process may.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self.seconds = seconds
        self._memory = memory
        self._lock = Lock()
        self._running: subprocess.Popen[str] | None = None
        atexit.register(self.stop)

    def begin(self) -> None:
        """Start the process, unless it runs."""
        with self._lock:
            self._running = self._running or self._start()

    def ask(self, line: str) -> str:
        """Return the answer to a line; empty where the process ended instead."""
        with self._lock:
            try:
                process = self._running = self._running or self._start()
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # interrupted: the answer would be taken for the next one's
                self.stop()
                raise
            if not answer:
                self.stop()
            return answer

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._running = self._running, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-c",
                _START,
                json.dumps(sys.path),
                str(self.seconds),
                str(self._memory),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )


_RENDERER = Renderer()


def begin() -> None:
    """Start what renders, which takes a while, beside other work that comes before it is needed."""
    _RENDERER.begin()


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    is_prompt: bool,
    variables: Mapping[str, Any] | None = None,
    renderer: Renderer = _RENDERER,
) -> str:
    """Return the text of `messages`, as `cvxq.template_program.render_chat` does.

    Raises TemplateError, which says what the template says, and TemplateLimitError.
    """
    line = json.dumps([template, messages, special_tokens, is_prompt, variables or {}])
    answer = json.loads(renderer.ask(line) or "{}")
    if "failed" in answer:
        raise TemplateError(f"the model's chat template refuses these turns: {answer['failed']}")
    if "text" not in answer:
        raise TemplateLimitError(
            f"the model's chat template takes more than {renderer.seconds} s or crashes; "
            "mend it in chat_template.jinja of the source and convert the model again"
        )
    text: str = answer["text"]
    return text

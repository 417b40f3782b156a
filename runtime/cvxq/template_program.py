"""Chat templates, rendered as transformers renders them.

A template is a jinja2 program of the model's author, run in the same immutable sandbox, with the
same extensions, filters and globals.  `{% generation %}` marks the assistant's tokens for training;
here its body is rendered as if the tag were not there.

The sandbox keeps a template from everything but its variables, not from looping or growing without
end.  So it runs in a process of its own, which `main` is; `cvxq.rendering` starts and asks it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

ROOM = 1 << 20  # characters of a text beside what it was given
MOST_GROWTH = 8  # characters for one that was given


def main(seconds: float, memory: int) -> None:
    """Answer each line of stdin, arguments of `render_chat`, by a line: a text, or what failed.

    seconds: for one text, after which the process ends; memory: bytes of addresses, where the
    system can bound them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to feel
    _limit_memory(memory)
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    for line in sys.stdin:
        # It ends the process even in the middle of one endless operation.
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            text, most = render_chat(*json.loads(line)), ROOM + MOST_GROWTH * len(line)
            if len(text) > most:
                raise TemplateError(f"it makes {len(text)} characters of {len(line)}")
            text.encode()  # jinja2 lets halves of characters pass
            answer = {"text": text}
        except MemoryError:
            answer = {"failed": f"it takes more than {memory >> 20} MB of memory"}
        except Exception as error:  # a program of the model's author: anything may fail
            answer = {"failed": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)
        faulthandler.cancel_dump_traceback_later()


def _limit_memory(memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS knows this limit, and refuses it
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of `messages`, each with "role" and "content", maybe "reasoning_content".

    special_tokens: what the template may know as `bos_token` and so on; variables: what else it
    may know, `tools` for example.  Raises what the template raises, which may be anything.
    """
    known = {
        "tools": None,
        "documents": None,
        **special_tokens,
        **(variables or {}),
        "messages": [_message(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }
    return _compile(template).render(known)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that has its reasoning under a further name, which some templates read."""
    if "reasoning_content" not in message:
        return dict(message)
    return {"thinking": message["reasoning_content"], **message}


@lru_cache(maxsize=4)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own convention

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body in a scope of its own, as transformers' call block has."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without jinja2's escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """`dict` as templates may use it: calls only."""

    def __call__(self, *pairs: Any, **items: Any) -> dict[Any, Any]:
        return dict(*pairs, **items)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """Return a dict of the given keys."""
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*arguments: Any, **items: Any) -> None:
        # As jinja2's own, so that an attribute may be called self.
        self, values = arguments[0], dict(*arguments[1:], **items)
        for name in values:
            _check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


def _check(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not store {name!r} in a namespace")

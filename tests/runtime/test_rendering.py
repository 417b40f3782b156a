"""A chat template of a stranger takes neither time nor memory without end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from cvxq.lean.tokenizer import LeanTokenizer
from cvxq.rendering import Renderer, TemplateError, TemplateLimitError, render
from cvxq.turns import turn_format

MESSAGES = [{"role": "user", "content": "Hi ü"}]


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    made = Renderer(seconds=1)
    yield made
    made.stop()


def text_of(template: str, renderer: Renderer) -> str:
    return render(template, MESSAGES, {"bos_token": "<s>"}, True, {"tools": None}, renderer)


def test_a_template_renders_in_its_process(renderer: Renderer) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ tools is none }}"
    assert text_of(template, renderer) == "<s>Hi üTrue"


def test_a_process_that_began_is_the_one_asked(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer.begin()
    monkeypatch.setattr(subprocess, "Popen", None)
    assert text_of("next", renderer) == "next"


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    ],
)
def test_an_endless_template_is_stopped(endless: str, renderer: Renderer) -> None:
    with pytest.raises(TemplateLimitError, match="takes more than 1 s or crashes"):
        text_of(endless, renderer)
    assert text_of("next", renderer) == "next"


@pytest.mark.parametrize(
    ("greedy", "told"),
    [
        ("{{ 'a' * 9999999999 }}", "more than 512 MB of memory"),
        ("{{ 'a' * 9999999 }}", "makes 9999999 characters of"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
    ],
)
def test_a_text_is_bounded(greedy: str, told: str, renderer: Renderer) -> None:
    with pytest.raises(TemplateError, match=told):
        text_of(greedy, renderer)


def test_an_interrupt_does_not_shift_answers(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_of("first", renderer)
    process = renderer._running
    assert process is not None
    assert process.stdout is not None

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(process.stdout, "readline", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        text_of("second", renderer)
    assert text_of("third", renderer) == "third"


def test_a_chat_refuses_an_endless_template_after_one_try(
    character_tokenizer: Callable[[str | None], LeanTokenizer],
) -> None:
    form = turn_format(character_tokenizer("{{ 9 ** (9 ** 9) }}"))
    begin = time.monotonic()
    with pytest.raises(TemplateLimitError):
        form.encode(MESSAGES)
    assert time.monotonic() - begin < 1


def test_the_process_ends_with_its_parent() -> None:
    program = (
        "from cvxq.rendering import _RENDERER, render\n"
        "render('x', [], {}, True)\n"
        "print(_RENDERER._running.pid, flush=True)\n"
        "import os; os._exit(0)"
    )
    made = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    child = int(made.stdout)
    for _ in range(100):
        if not _runs(child):
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def _runs(process: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")

"""The command group: speed and size of its help, laziness, exit codes of broken use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from cvxq.cli import failures
from cvxq.cli.application import COMMANDS, application

SCREEN_LINES, SCREEN_COLUMNS = 24, 80


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cvxq.cli", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


def test_help_fits_a_screen_and_has_an_example() -> None:
    result = CliRunner().invoke(application, ["--help"], terminal_width=SCREEN_COLUMNS)
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert len(lines) <= SCREEN_LINES
    assert max(map(len, lines)) <= SCREEN_COLUMNS
    assert 'cvxq generate model.cvxq "Once upon a time"' in result.output
    for code in (0, 1, 2, 3, 4, 5, 6, 130):
        assert re.search(rf"\b{code} [a-z]", result.output), code


def test_no_arguments_show_the_help() -> None:
    result = CliRunner().invoke(application, [])
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_help_answers_fast_and_without_torch() -> None:
    """A third of a second on an idle machine; the bound here allows for a busy one."""
    code = (
        "import sys, atexit\n"
        "from cvxq.cli import main\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'}\n"
        "atexit.register(lambda: print('LOADED', sorted(heavy & set(sys.modules))))\n"
        "sys.argv = ['cvxq', '--help']\n"
        "main()\n"
    )
    fastest = 1e9
    for _ in range(3):
        begin = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        fastest = min(fastest, time.perf_counter() - begin)
        assert result.stdout.rstrip().endswith("LOADED []")
    assert fastest < 1.5


def test_version_is_that_of_the_distribution() -> None:
    result = CliRunner().invoke(application, ["--version"])
    assert re.fullmatch(r"cvxq \d+\.\d+\.\d+\S*\n", result.output)


@pytest.mark.parametrize("name", COMMANDS)
def test_group_help_is_not_stale(name: str) -> None:
    """The group prints its own sentences, so that it need not import the subcommands."""
    context = click.Context(application)
    command = application.get_command(context, name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(limit=100) == COMMANDS[name][1]


@pytest.mark.parametrize("name", COMMANDS)
def test_subcommand_help_has_an_example(name: str) -> None:
    result = CliRunner().invoke(application, [name, "--help"], terminal_width=SCREEN_COLUMNS)
    assert result.exit_code == 0
    assert f"cvxq {name} " in result.output
    assert "Example:" in result.output


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option"),
        (["inspect"], "Missing argument 'FILE'"),
        (["inspect", "x.cvxq", "--nonsense"], "No such option"),
        (["verify", "x.cvxq", "y.cvxq"], "unexpected extra argument"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(arguments: list[str], found: str) -> None:
    result = CliRunner().invoke(application, arguments)
    assert result.exit_code == failures.USAGE
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert found in result.stderr
    assert "--help" in result.stderr


class SurpriseError(Exception):
    """An error that no code foresaw."""


def _break_inspect(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("cvxq.cli.inspect.summarize", fail)
    monkeypatch.setattr("cvxq.cli.inspect.model_file", Path)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            SurpriseError("first\nsecond"),
            1,
            "(SurpriseError): first second; --traceback",
        ),
        (MemoryError(), 6, "not enough memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"),
            6,
            "not enough memory: CUDA out",
        ),
        (PermissionError(13, "Permission denied", "a.cvxq"), 3, "a.cvxq: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    _break_inspect(monkeypatch, error)
    result = CliRunner().invoke(application, ["inspect", "a.cvxq"])
    assert result.exit_code == code
    assert len(result.stderr.splitlines()) == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_traceback_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    _break_inspect(monkeypatch, SurpriseError("here"))
    result = CliRunner().invoke(application, ["--traceback", "inspect", "a.cvxq"])
    assert result.exit_code == failures.UNEXPECTED
    assert "Traceback" in result.stderr
    assert "in fail" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")
def test_a_reader_that_leaves_early_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "cvxq.cli", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert result.stderr == b""
    assert result.returncode == 141

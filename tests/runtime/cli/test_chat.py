"""`cvxq chat`: turns from a pipe and from a terminal, the cache, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cvxq.session import Logits, Session

Cvxq = Callable[..., Result]


def test_a_line_is_a_turn(cvxq: Cvxq, chat_file: Path) -> None:
    result = cvxq("chat", chat_file, "--max-tokens", 5, "--seed", 1, input="ab\n\ncd\n")
    assert result.exit_code == 0
    assert "chat template" in result.stderr
    assert result.stdout.count("\n") >= 2


def test_plain_format_without_a_template(cvxq: Cvxq, model_file: Path) -> None:
    result = cvxq("chat", model_file, "--max-tokens", 5, "--seed", 1, input="ab\n")
    assert result.exit_code == 0
    assert "plain turns" in result.stderr


def test_answers_follow_the_history(cvxq: Cvxq, chat_file: Path) -> None:
    def answers(lines: str) -> str:
        return cvxq("chat", chat_file, "--max-tokens", 6, "--temperature", 0, input=lines).stdout

    assert answers("ab\ncd\n") != answers("cd\n") + answers("cd\n")
    assert answers("ab\n/clear\nab\n") == answers("ab\n") * 2


def test_an_answer_that_fills_the_context_says_so_or_shifts(cvxq: Cvxq, chat_file: Path) -> None:
    common = ("chat", chat_file, "--max-tokens", 90, "--temperature", 4, "--seed", 2)
    common = (*common, "--top-k", 40, "--system", "abc")
    ended = cvxq(*common, "--context", 40, input="ab\n")
    assert ended.exit_code == 0
    assert "the context of 40 tokens is full" in ended.stderr
    shifted = cvxq(*common, "--context", 40, "--shift", input="ab\n")
    assert shifted.exit_code == 0
    assert "is full" not in shifted.stderr
    assert shifted.stdout.startswith(ended.stdout.rstrip())
    assert len(shifted.stdout) > len(ended.stdout)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens that each forward pass reads, prefill or decoding."""
    counts: list[int] = []
    feed = Session.feed

    def counted(self: Session, ids: Sequence[int]) -> Logits:
        counts.append(len(ids))
        return feed(self, ids)

    monkeypatch.setattr(Session, "feed", counted)
    return counts


def test_only_the_new_suffix_is_read(
    cvxq: Cvxq, chat_file: Path, fed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second prompt repeats the first one and the answer; what was read stays read."""
    resumed: list[tuple[list[int], list[int]]] = []
    resume = Session.resume

    def noted(self: Session, ids: Sequence[int]) -> Logits:
        resumed.append((list(self.ids), list(ids)))
        return resume(self, ids)

    monkeypatch.setattr(Session, "resume", noted)
    options = ("--max-tokens", 4, "--temperature", 1, "--seed", 3)
    result = cvxq("chat", chat_file, *options, input="abcdefgh\nij\n")
    assert result.exit_code == 0
    (_, first), (read, second) = resumed
    pairs = enumerate(zip(read, second, strict=False))
    common = next((i for i, (ours, theirs) in pairs if ours != theirs), len(read))
    assert common >= len(first)
    assert [count for count in fed if count > 1] == [len(first), len(second) - common]


def test_oldest_turns_are_dropped_with_a_notice(cvxq: Cvxq, chat_file: Path) -> None:
    result = cvxq("chat", chat_file, "--max-tokens", 8, "--seed", 1, input="abcdefgh\n" * 6)
    assert result.exit_code == 0
    assert "the context is full: dropped the oldest turn" in result.stderr


def test_message_that_is_too_long_is_refused_and_the_chat_goes_on(
    cvxq: Cvxq, chat_file: Path
) -> None:
    result = cvxq("chat", chat_file, "--max-tokens", 8, "--seed", 1, input="x" * 70 + "\nab\n")
    assert result.exit_code == 0
    assert "the context holds 64" in result.stderr
    assert result.stdout.strip()


def test_commands_inside(cvxq: Cvxq, chat_file: Path) -> None:
    result = cvxq("chat", chat_file, input="/help\n/nonsense\n/exit\nnever read\n")
    assert result.exit_code == 0
    assert "/clear" in result.stderr
    assert "no command /nonsense" in result.stderr
    assert result.stdout == ""


def test_input_that_is_not_utf8(fails: Callable[..., str], chat_file: Path, cvxq: Cvxq) -> None:
    result = cvxq("chat", chat_file, input=b"\xff\xfe\n")
    assert result.exit_code == 3
    assert "not UTF-8" in result.stderr.splitlines()[-1]


def start(path: Path, *options: str, **streams: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cvxq.cli", "chat", str(path), "--threads", "1", *options],
        encoding="utf-8",
        **streams,  # type: ignore[call-overload]
    )


@pytest.mark.slow
def test_piped_lines_through_a_process(chat_file: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(chat_file, "--max-tokens", "4", "--seed", "1", **pipes) as process:
        out, err = process.communicate("ab\n/exit\n", timeout=240)
    assert process.returncode == 0
    assert out.strip()
    assert "Traceback" not in err


class Terminal:
    """The other end of a pseudo-terminal."""

    def __init__(self, master: int) -> None:
        self.master = master
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 240) -> None:
        """Read until `pattern` occurs in what has not been matched yet."""
        import select

        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"{pattern!r} never came: {self.seen!r}"
            if select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
        self.seen = self.seen[match.end() :]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_program(
    make_file: Callable[..., object], plain_tokenizer: dict[str, bytes]
) -> None:
    """A model without an end token and with a long context talks until it is stopped."""
    import pty

    path = endless(make_file, plain_tokenizer)
    master, slave = pty.openpty()
    terminal = Terminal(master)
    streams = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True}
    options = ("--max-tokens", "1000000", "--temperature", "1", "--seed", "1")
    process = start(path, *options, **streams)
    os.close(slave)
    try:
        terminal.wait_for("> ")
        interrupt_prompt(process, terminal)
        terminal.wait_for("> ")
        terminal.type("ab\n")
        terminal.wait_for(r"ab\r\n\S+.*\S")  # the echo, then an answer that has begun
        process.send_signal(signal.SIGINT)
        terminal.wait_for("stopped")
        terminal.wait_for("> ")
        assert process.poll() is None
        terminal.type("\x04")
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def interrupt_prompt(process: subprocess.Popen[str], terminal: Terminal) -> None:
    """Ctrl-C at the prompt: a hint, nothing else.

    A signal between the prompt's printing and the start of the read waits for the next one.
    """
    for _ in range(30):
        process.send_signal(signal.SIGINT)
        try:
            return terminal.wait_for("/exit or Ctrl-D leaves", seconds=2)
        except AssertionError:
            assert process.poll() is None
    raise AssertionError(f"no hint after 30 interrupts: {terminal.seen!r}")


def endless(make_file: Callable[..., Any], files: dict[str, bytes]) -> Path:
    path: Path = make_file(
        "llama",
        files=files,
        config={"max_position_embeddings": 1 << 20, "eos_token_id": None},
    ).path
    return path


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_ends_generate_with_130(
    make_file: Callable[..., object], plain_tokenizer: dict[str, bytes]
) -> None:
    path = endless(make_file, plain_tokenizer)
    command = [sys.executable, "-m", "cvxq.cli", "generate", str(path), "ab", "--threads", "1"]
    with subprocess.Popen(
        [*command, "--max-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        err = process.stderr.read().decode()
        assert process.wait(timeout=120) == 130
    assert err.strip() == "cvxq: interrupted"

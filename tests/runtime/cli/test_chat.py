"""`cvxq chat`: turns from a pipe and from a terminal, the cache, Ctrl-C."""

from __future__ import annotations

import io
import json
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
from cvxq.chat import Conversation, Prompt
from cvxq.cli.chat import Chat
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
    result = cvxq("chat", chat_file, input="/help\n/clear \n/exit\nnever read\n")
    assert result.exit_code == 0
    assert "/clear" in result.stderr
    assert "is forgotten" in result.stderr
    assert result.stdout == ""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the model is asked."""
    texts: list[str] = []
    ask = Conversation.ask

    def noted(self: Conversation, text: str) -> Prompt:
        texts.append(text)
        return ask(self, text)

    monkeypatch.setattr(Conversation, "ask", noted)
    return texts


@pytest.mark.parametrize(
    ("line", "sent", "is_noticed"),
    [
        ("/no_think what is 2?", "/no_think what is 2?", False),
        ("/usr/bin holds what?", "/usr/bin holds what?", False),
        ("/no_think", "/no_think", False),
        ("/quit", "/quit", True),
        ("/exit now", "/exit now", True),
        ("/", "/", False),
        (" /exit", " /exit", True),
        ("//help", "/help", False),
        ("//", "/", False),
        ("// a", "/ a", False),
    ],
)
def test_what_is_no_command_is_sent(
    cvxq: Cvxq, chat_file: Path, asked: list[str], line: str, sent: str, is_noticed: bool
) -> None:
    result = cvxq("chat", chat_file, "--max-tokens", 2, input=f"{line}\n/exit\n")
    assert result.exit_code == 0
    assert asked == [sent]
    assert (f"{line} is no command, so it is sent" in result.stderr) == is_noticed


TURNS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_the_end_of_a_turn_ends_an_answer(
    cvxq: Cvxq, special_file: Callable[..., Path], recite: Callable[..., None]
) -> None:
    file = special_file(TURNS, ["<|end|>"])
    recite(file, "Hey!<|end|>[user]And you?<|end|>")
    assert cvxq("chat", file, input="ab\n").stdout == "Hey!\n"
    assert cvxq("generate", file, "ab<|end|>").stdout == "Hey!\n"
    assert cvxq("generate", file, "ab").stdout == "Hey![user]And you?\n"


def test_a_system_text_is_never_lost(
    cvxq: Cvxq, special_file: Callable[..., Path], recite: Callable[..., None], asked: list[str]
) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    file = special_file(refusing + TURNS, ["<|end|>"])
    recite(file, "Hey!<|end|>")
    result = cvxq("chat", file, "--system", "Be brief.", input="ab\ncd\n")
    assert (result.exit_code, result.stdout) == (0, "Hey!\n" * 2)
    assert "has no system role: --system goes before the first message" in result.stderr
    assert "system role" not in cvxq("chat", file, input="ab\n").stderr


def test_a_chat_without_any_answer_fails(
    cvxq: Cvxq, special_file: Callable[..., Path], recite: Callable[..., None]
) -> None:
    file = special_file("{{ raise_exception('not today') }}", [])
    result = cvxq("chat", file, input="ab\ncd\n")
    assert result.exit_code == 2
    assert result.stderr.count("refuses these turns: not today") == 2
    assert cvxq("chat", file, input="/exit\n").exit_code == 0
    lost = special_file("{{ messages | length }}", [])
    result = cvxq("chat", lost, input="ab\n")
    assert result.exit_code == 2
    assert "leaves out what the user says" in result.stderr


def test_a_token_that_the_model_lacks_is_refused_and_the_chat_goes_on(
    cvxq: Cvxq, fails: Callable[..., str], special_file: Callable[..., Path], tmp_path: Path
) -> None:
    """The tokenizer has a hundred tokens more than the model, the last of them unknown to it."""
    file = special_file(TURNS, [f"<|{n}|>" for n in range(100)])
    found = "the text has token 179, '<|99|>', but the model only knows tokens 0 to 95"
    result = cvxq("chat", file, "--max-tokens", 3, input="ab<|99|>\nab\n")
    assert result.exit_code == 0
    assert result.stderr.count(found) == 1
    assert cvxq("chat", file, "--max-tokens", 3, input="ab<|99|>\n").exit_code == 2
    assert found in fails(2, "generate", file, "ab<|99|>")
    dense = cvxq("generate", file, "ab<|99|>", "--weights", "dense")
    assert dense.exit_code == 2
    assert found in dense.stderr
    text = tmp_path / "text.txt"
    text.write_text("ab<|99|>cd")
    assert found in fails(2, "perplexity", file, "--text", text)


THINKING = TURNS.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<T>{{ m.reasoning_content }}</T>{% endif %}{{ m.content }}",
)


@pytest.mark.parametrize("special", [[], ["<T>", "</T>"]])
@pytest.mark.parametrize("begun", ["", "<T>\n"])
def test_thinking_is_shown_or_hidden_and_kept_for_the_template(
    cvxq: Cvxq,
    special_file: Callable[..., Path],
    recite: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    special: list[str],
    begun: str,
) -> None:
    file = special_file(THINKING.replace("[assistant]", f"[assistant]{begun}"), special)
    opening = "" if begun else "<T>\n"
    recite(file, f"{opening}hm</T>\n\nYes.", f"{opening}still at it")
    result = cvxq("chat", file, input="ab\ncd\n")
    shown = "<T>hm" if begun else "<T>\nhm"
    assert result.stdout.startswith(f"{shown}</T>\n\nYes.\n<T>")
    assert "still thinking; --max-tokens" in result.stderr
    messages: list[dict[str, str]] = []
    monkeypatch.setattr(Conversation, "answered", answered_into(messages))
    assert cvxq("chat", file, "--hide-thinking", input="ab\ncd\n").stdout == "Yes.\n\n"
    assert messages == [{"text": "Yes.", "thought": "hm"}]


def answered_into(messages: list[dict[str, str]]) -> Callable[..., None]:
    def answered(self: Conversation, text: str, thought: str = "") -> None:
        messages.append({"text": text, "thought": thought})

    return answered


def test_thinking_is_dimmed_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(is_terminal: bool) -> str:
        stdout = io.StringIO()
        stdout.isatty = lambda: is_terminal  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdout", stdout)
        chat = Chat.__new__(Chat)
        chat.hide_thinking = False
        chat.show([("<think>hm", True), ("</think>", True), ("Yes.", False)])
        return stdout.getvalue()

    assert shown(False) == "<think>hm</think>Yes."
    assert shown(True) == "\x1b[2m<think>hm\x1b[0m\x1b[2m</think>\x1b[0mYes."


def test_input_that_is_not_utf8(fails: Callable[..., str], chat_file: Path, cvxq: Cvxq) -> None:
    result = cvxq("chat", chat_file, input=b"\xff\xfe\n")
    assert result.exit_code == 3
    assert "not UTF-8" in result.stderr.splitlines()[-1]


def test_a_mark_at_the_beginning_of_piped_lines_never_reaches_the_model(
    cvxq: Cvxq, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    take = Chat.take_turn

    def note(self: Chat, text: str) -> None:
        asked.append(text)
        take(self, text)

    monkeypatch.setattr(Chat, "take_turn", note)
    lines = b"\xef\xbb\xbf/help\nHi \xc3\xa9\xf0\x9f\x98\x80\n"
    options = ("--max-tokens", 1, "--seed", 1)
    result = cvxq("chat", chat_file, *options, input=lines)
    assert result.exit_code == 0, result.stderr
    assert "/clear  forget" in result.stderr
    cvxq("chat", chat_file, *options, input=b"\xef\xbb\xbfHi\r\n\xef\xbb\xbf")
    assert asked == ["Hi é😀", "Hi", "\ufeff"]


@pytest.mark.slow
def test_piped_lines_are_utf8_in_every_locale(chat_file: Path) -> None:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
    locale = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    process = start(chat_file, "--max-tokens", "1", env=locale, **streams)
    answers, _ = process.communicate("\ufeff/exit\n")
    assert (process.returncode, answers) == (0, "")


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
    settings = json.loads(files["tokenizer_config.json"])
    del settings["eos_token"]
    files = {**files, "tokenizer_config.json": json.dumps(settings).encode()}
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

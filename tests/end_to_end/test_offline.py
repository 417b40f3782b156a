"""Nothing asks the network unless a hub id is given."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "llama-3-bits.cvxq"
DEMO = Path(__file__).parents[2] / "demo"
Offline = Callable[..., str]
# What looks a name up or connects ends the process, whether or not its failure would be caught.
GUARD = """
import os, sys
def watch(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] == "127.0.0.1":
        return
    if event in ("socket.getaddrinfo", "socket.gethostbyname") or (
        event == "socket.connect" and isinstance(arguments[1], tuple)
    ):
        os.write(2, f"asked the network: {event} {arguments[1:]}".encode())
        os._exit(99)
sys.addaudithook(watch)
"""
COMMAND = "from cvxq.cli import main; main()"


def without_interfaces() -> list[str]:
    """A command in front that gives a network namespace of its own; empty where not permitted."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    for options in (["-n"], ["-rn"]):
        if subprocess.run([unshare, *options, "true"], capture_output=True).returncode == 0:
            return [unshare, *options]
    return []


def start(*arguments: object, program: str = COMMAND) -> subprocess.Popen[str]:
    """Start a command without a network."""
    command = [sys.executable, "-c", GUARD + program, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSF"))}
    return subprocess.Popen(
        [*without_interfaces(), *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def offline() -> Offline:
    """Return a function that runs a command without a network and returns its stdout."""

    def run(*arguments: object, said: str = "", program: str = COMMAND) -> str:
        process = start(*arguments, program=program)
        shown, told = process.communicate(said)
        assert process.returncode == 0, told
        return shown

    return run


def test_the_guard_notices(offline: Offline) -> None:
    with pytest.raises(AssertionError, match="asked the network"):
        offline(program="import socket; socket.create_connection(('192.0.2.1', 9))")


@pytest.mark.parametrize("command", [["verify"], ["inspect"], ["bench"]])
def test_a_file_is_enough(command: list[str], offline: Offline) -> None:
    assert offline(command[0], GOLDEN, *command[1:])


@pytest.mark.slow
def test_checking_against_transformers(offline: Offline) -> None:
    assert offline("verify", GOLDEN, "--deep")


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, converted without a network."""
    file = tmp_path_factory.mktemp("offline") / "demo.cvxq"
    process = start("convert", DEMO / "model", "-o", file, "--bits", "4", "--method", "rtn")
    _, told = process.communicate()
    assert process.returncode == 0, told
    return file


@pytest.mark.slow
def test_writing_and_measuring(demo_file: Path, tmp_path: Path, offline: Offline) -> None:
    assert offline("generate", demo_file, "The old house", "--max-tokens", 5, "--weights", "dense")
    assert offline("chat", demo_file, "--max-tokens", 5, said="Hello\n")
    text = ("--text", DEMO / "evaluation.txt", "--context", 32, "--windows", 1)
    assert offline("perplexity", demo_file, *text, "--against", DEMO / "model")
    offline("export", demo_file, tmp_path / "folder")
    assert (tmp_path / "folder" / "config.json").exists()


@pytest.mark.slow
def test_a_server_asks_no_other(demo_file: Path) -> None:
    pytest.importorskip("starlette", reason="needs the extra `serve`")
    process = start("serve", demo_file, "--port", 0)
    assert process.stderr is not None
    told = process.stderr.readline()
    assert told.startswith("serving demo at http://127.0.0.1:"), process.communicate()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (0, 130)

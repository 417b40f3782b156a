"""A conversion that ends early, however it ends, leaves no half file and no damage."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_format import Writer

Save = Callable[..., Path]
OPTIONS = ConversionOptions.of(bits=4.0, group_size=16, sequences=3, length=12, gain=0.5)
OLD = b"an older file"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The file to be written, of which an older version exists, alone in its folder."""
    path = tmp_path / "out" / "model.cvxq"
    path.parent.mkdir()
    path.write_bytes(OLD)
    return path


def assert_untouched(output: Path) -> None:
    assert output.read_bytes() == OLD
    journal = output.with_name("model.cvxq.journal")
    assert {*output.parent.iterdir()} <= {output, journal}


@pytest.mark.parametrize(
    "stage",
    ["load", "calibrate", "measure", "hessians", "allocate", "quantize", "correct", "write"],
)
def test_ctrl_c_in_any_stage(stage: str, save_network: Save, output: Path) -> None:
    def interrupt(current: str, done: int, total: int) -> None:
        if current == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(save_network("llama")), output, OPTIONS, interrupt)
    assert_untouched(output)


@pytest.mark.parametrize("call", ["Writer.add_file", "Writer.add_companded", "os.fsync"])
def test_a_disk_that_fails_while_writing(
    call: str, save_network: Save, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvxq_converter.journal.SHORTEST", math.inf)
    owner, name = (Writer if call.startswith("Writer") else os), call.rpartition(".")[2]
    genuine = getattr(owner, name)
    left = 1  # calls that still succeed

    def fail(*arguments: Any, **options: Any) -> None:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        genuine(*arguments, **options)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="No space left"):
        convert(str(save_network("llama")), output, OPTIONS)
    assert_untouched(output)


def command(folder: Path, output: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "cvxq.cli", "convert", str(folder), "-o", str(output)),
        *("--bits", "4", "--group-size", "16", "--threads", "1", *options),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_command(
    number: signal.Signals,
    save_network: Save,
    output: Path,
    read_until: Callable[[Any, bytes], None],
) -> None:
    """The signal comes when the first line of progress of the sampling has been written."""
    arguments = command(save_network("llama"), output, "--sequences", "4096", "--length", "64")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        read_until(process.stderr, b"calibrate")
        process.send_signal(number)
        stdout, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == b""
    assert rest.decode().splitlines()[-1] == "cvxq: interrupted"
    assert b"Traceback" not in rest
    assert_untouched(output)


def test_a_kill_in_the_very_last_moment_of_writing(save_network: Save, output: Path) -> None:
    """All bytes are written, the file is about to take its place."""
    script = (
        "import os, pathlib, signal, sys, numpy\n"
        "from cvxq_format import Writer\n"
        "def die(self, target):\n"
        "    assert self.stat().st_size > 40_000\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pathlib.Path.replace = die\n"
        "with Writer(pathlib.Path(sys.argv[1])) as writer:\n"
        "    writer.add_raw('a', numpy.ones(10_000, numpy.float32))\n"
    )
    arguments = [sys.executable, "-c", script, str(output)]
    process = subprocess.run(arguments, capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert output.read_bytes() == OLD
    left = [path for path in output.parent.iterdir() if path != output]
    assert [path.suffix for path in left] != [".cvxq"]  # a leftover does not pass for a model
    convert(str(save_network("llama")), output, OPTIONS)  # nor is it in the way
    assert output.stat().st_size > 10_000

"""The commands on the lean path: what they import, and what they say when they leave it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cvxq_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())

HEAVY = ("torch", "transformers", "cvxq_converter", "triton", "huggingface_hub", "safetensors")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "FILE", "ab", "--max-tokens", "4", "--seed", "1"],
        ["chat", "FILE", "--max-tokens", "4"],
        ["bench", "FILE", "--repeats", "1"],
    ],
)
def test_the_lean_path_imports_neither_torch_nor_transformers(
    arguments: list[str], chat_file: Path
) -> None:
    words = [str(chat_file) if word == "FILE" else word for word in arguments]
    code = (
        "import sys\n"
        "from cvxq.cli.application import application\n"
        f"application.main({words!r}, standalone_mode=False)\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "print('LOADED', sorted(heavy), file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input="ab\n", capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "LOADED []"
    assert "through transformers" not in result.stderr


def test_commands_say_that_transformers_runs_and_why(
    cvxq: Callable[..., Result], make_file: Callable[..., Any]
) -> None:
    path = make_file("llama", with_record=False).path
    result = cvxq("bench", path, "--repeats", 1)
    assert result.exit_code == 0
    line = next(line for line in result.stderr.splitlines() if "transformers" in line)
    assert line == (f"{path} runs through transformers: it has no decoder.json")
    assert json.loads(result.stdout.splitlines()[-1])["path"] == "transformers"

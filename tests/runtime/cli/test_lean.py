"""What the commands say when they leave the lean path."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result
from cvxq_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())


def test_commands_say_that_transformers_runs_and_why(
    cvxq: Callable[..., Result], make_file: Callable[..., Any]
) -> None:
    path = make_file("llama", with_record=False).path
    result = cvxq("bench", path, "--repeats", 1)
    assert result.exit_code == 0
    line = next(line for line in result.stderr.splitlines() if "transformers" in line)
    assert line == (f"{path} runs through transformers: it has no decoder.json")
    assert json.loads(result.stdout.splitlines()[-1])["path"] == "transformers"

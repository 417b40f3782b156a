"""`cvxq inspect`: how long texts may be, and what they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result
from cvxq_format.memory import available_memory

MakeFile = Callable[..., Any]


def test_inspect_shows_them(cvxq: Callable[..., Result], make_file: MakeFile) -> None:
    path: Path = make_file("gemma3").path
    shown = cvxq("inspect", path).stdout
    assert "context 64 tokens, keys and values take 512 bytes per token" in shown
    assert "(float32, 2 layers, 1 with a window of 8)" in shown
    record = json.loads(cvxq("inspect", path, "--json").stdout)
    assert record["context"] == 64
    assert record["key_value_cache"]["bytes_per_token"] == 512
    if available_memory() is not None:
        assert record["largest_context_in_free_memory"] > 64
        assert "free memory holds the weights and" in shown
    dynamic = cvxq("inspect", make_file("llama-dynamic", "dynamic.cvxq").path).stdout
    assert "from its record, with a context of at most 64 tokens" in dynamic


def test_a_file_cannot_send_commands_to_the_terminal(
    cvxq: Callable[..., Result], make_file: MakeFile
) -> None:
    hostile = "\x1b]0;title\x07\x9b2J"
    provenance = json.dumps({hostile: hostile}, ensure_ascii=False).encode()
    report = json.dumps({"decoder": {"reason": hostile}}).encode()
    files = {"provenance.json": provenance, "report.json": report, "config.json": b"{}"}
    path = make_file("llama", files=files).path
    for options in ((), ("--json",)):
        shown = cvxq("inspect", path, *options).stdout
        assert "title" in shown
        assert all(character.isprintable() or character == "\n" for character in shown)


def test_json_keeps_what_no_terminal_can_show(
    cvxq: Callable[..., Result], make_file: MakeFile
) -> None:
    strange = "half \ud800 \u202e\u2028 \U000e0001 \x7f, and é 漢 are shown"
    files = {"report.json": json.dumps({"a": strange}).encode()}
    shown = cvxq("inspect", make_file("llama", files=files).path, "--json").stdout
    assert json.loads(shown)["report"] == {"a": strange}
    assert "é 漢" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)

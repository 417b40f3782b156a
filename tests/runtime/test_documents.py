"""Folders of documents become tasks; what is no task is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cvxq.documents import tasks_of
from cvxq.errors import ArgumentError

LINES: dict[str, dict[str, Any]] = {
    "choice": {"query": "Question: ab?", "choices": ["a", "b"], "gold": 1},
    "beginnings": {"context_options": ["ab", "ac"], "continuation": "d.", "gold": 0},
    "last-word": {"context": "ab c", "continuation": "d"},
    "sums": {"question": "1 + 1?", "answer": "Two.\n#### 2"},
}


def test_what_a_line_holds_says_what_is_asked(tmp_path: Path) -> None:
    for name, line in LINES.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**line, "more": 1}) + "\n")
    made = tasks_of(tmp_path, list(LINES))
    assert [task["task"] for task in made] == list(LINES)
    kinds = ["multiple_choice", "multiple_choice", "loglikelihood", "generate_until"]
    assert [task["output_type"] for task in made] == kinds
    files = [task["dataset_kwargs"]["data_files"]["test"] for task in made]
    assert files == [str(tmp_path / f"{name}.jsonl") for name in LINES]


def test_what_is_no_task(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "b.jsonl").write_text("[]\n")
    (tmp_path / "c.jsonl").write_text("{\n")
    for name, message in (
        ("a", "the first line has text; allowed are query, choices, gold; context_options,"),
        ("b", "the first line has ; allowed"),
        ("c", "the first line is not a JSON object"),
        ("d", r"d\.jsonl does not exist; tasks in .*: a, b, c"),
    ):
        with pytest.raises(ArgumentError, match=message):
            tasks_of(tmp_path, [name])

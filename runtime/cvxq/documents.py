"""Documents of benchmarks in a folder, a NAME.jsonl each, as tasks of lm-evaluation-harness.

What a line holds says what is asked:

    {"query", "choices", "gold"}                  the likeliest of several endings
    {"context_options", "continuation", "gold"}   the beginning that makes an ending likeliest
    {"context", "continuation"}                   the one ending, by the likeliest tokens
    {"question", "answer"}                        a number, behind #### in the answer
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvxq.errors import ArgumentError

_SUFFIX = ".jsonl"
_LEAST = {"aggregation": "mean", "higher_is_better": True}
_KINDS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (
        ("query", "choices", "gold"),
        {
            "output_type": "multiple_choice",
            # As in the harness's own tasks, what begins with a question is answered behind a word.
            "doc_to_text": "{{query.strip()}}{% if query.startswith('Question:') %}\nAnswer:"
            "{% endif %}",
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", **_LEAST}, {"metric": "acc_norm", **_LEAST}],
        },
    ),
    (
        ("context_options", "continuation", "gold"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{gold}}",
            "doc_to_target": "{{continuation}}",
            "doc_to_choice": "{{context_options}}",
            "metric_list": [{"metric": "acc", **_LEAST}],
        },
    ),
    (
        ("context", "continuation"),
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": " {{continuation}}",
            "target_delimiter": "",
            "metric_list": [
                {"metric": "acc", **_LEAST},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
    ),
    (
        ("question", "answer"),
        {
            "output_type": "generate_until",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{answer.split('####')[-1].strip().replace(',', '')}}",
            "fewshot_config": {"doc_to_target": "{{answer}}"},
            "generation_kwargs": {"until": ["Question:"], "do_sample": False},
            "filter_list": [
                {
                    "name": "last-number",
                    "filter": [
                        {
                            "function": "regex",
                            "group_select": -1,
                            "regex_pattern": r"(-?\d[\d,]*(?:\.\d+)?)",
                        },
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [
                {"metric": "exact_match", "regexes_to_ignore": [",", r"\.0*$"], **_LEAST}
            ],
        },
    ),
)


def tasks_of(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the configurations of the tasks `names` over the files of `folder`.

    Raises ArgumentError for one that has no file, or documents of another kind.
    """
    return [_task(folder, name) for name in names]


def _task(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}{_SUFFIX}"
    if not path.is_file():
        present = ", ".join(sorted(file.stem for file in folder.glob(f"*{_SUFFIX}"))) or "none"
        raise ArgumentError(f"{path} does not exist; tasks in {folder}: {present}")
    with path.open(encoding="utf-8") as stream:
        line = stream.readline()
    try:
        fields = set(json.loads(line))
    except (ValueError, TypeError):
        raise ArgumentError(
            f"{path}: the first line is not a JSON object, expected one per line"
        ) from None
    for wanted, task in _KINDS:
        if fields >= set(wanted):
            return {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(path)}},
                "test_split": "test",
                "fewshot_split": "test",
                **task,
            }
    allowed = "; ".join(", ".join(wanted) for wanted, _ in _KINDS)
    found = ", ".join(sorted(fields))
    raise ArgumentError(f"{path}: the first line has {found}; allowed are {allowed}")

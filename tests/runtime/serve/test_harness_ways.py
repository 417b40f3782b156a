"""The three ways in which lm-evaluation-harness reaches a file find the same.

pip install 'cvxq[eval,serve,convert]' 'lm_eval[api,hf]' accelerate
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
pytest.importorskip("aiohttp", reason="needs lm_eval[api]")
pytest.importorskip("accelerate", reason="needs lm_eval[hf]")

import cvxq
import cvxq.transformers
import numpy as np
from cvxq.documents import tasks_of
from cvxq.export import export
from cvxq.harness import HarnessModel, evaluate

pytestmark = [
    pytest.mark.lm_eval,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of the harness and what it imports
]
DOCUMENTS = 40
TOLERANCE = 0.05  # nats of an ending: the kernels round activations of pieces of other lengths


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of one task: which of four nonsense endings is likeliest."""
    chosen = random.Random(0)

    def word(letters: int) -> str:
        return "".join(chosen.choices("abcdefgh", k=letters))

    documents = [
        {"query": f"{word(5)} {word(3)}", "choices": [word(4) for _ in range(4)], "gold": i % 4}
        for i in range(DOCUMENTS)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps(document) for document in documents]
    (folder / "nonsense.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def file(make_file: Callable[..., Any], tokenizer_parts: dict[str, bytes]) -> Path:
    """A Llama, with a tokenizer that transformers reads as it is."""
    settings = json.loads(tokenizer_parts["tokenizer_config.json"])
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    files = {**tokenizer_parts, "tokenizer_config.json": json.dumps(settings).encode()}
    path: Path = make_file("llama", name="tiny.cvxq", files=files).path
    return path


def likelihoods(results: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Log-likelihoods of all endings, (documents, 4)."""
    samples = sorted(results["samples"]["nonsense"], key=lambda sample: sample["doc_id"])
    return np.array([[float(value) for value, _ in s["filtered_resps"]] for s in samples])


def test_three_ways_agree(file: Path, data: Path, tmp_path: Path, serving: Any) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = tmp_path / "folder"
    export(file, folder)
    tasks = tasks_of(data, ["nonsense"])
    with cvxq.load(file) as model:
        found = [evaluate(HarnessModel(model), tasks, None, None)]
        with serving(model) as running:
            client = LocalCompletionsAPI(
                model="tiny",
                base_url=f"{running.url}/v1/completions",
                tokenizer=str(folder),
                max_length=model.context_length,
            )
            found.append(evaluate(client, tasks, None, None))
    network = HFLM(pretrained=str(folder), device="cpu", batch_size=8)
    found.append(evaluate(network, tasks, None, None))

    ours, *others = [likelihoods(results) for results in found]
    assert ours.shape == (DOCUMENTS, 4)
    assert ours.std() > 0.5  # else equality would say nothing
    for theirs in others:
        assert np.abs(theirs - ours).max() < TOLERANCE
    best = np.sort(ours, axis=1)
    is_clear = best[:, -1] - best[:, -2] > 2 * TOLERANCE
    assert is_clear.sum() > DOCUMENTS / 2
    if is_clear.all():
        accuracies = {results["results"]["nonsense"]["acc,none"] for results in found}
        assert len(accuracies) == 1

"""A file as lm-evaluation-harness sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

import cvxq
import numpy as np
from cvxq.errors import ArgumentError
from cvxq.harness import HarnessModel
from lm_eval.api.instance import Instance

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of the harness and what it imports
]
TOLERANCE = 0.05  # nats of a few tokens: the kernels round activations of pieces of other lengths


def requests(*pairs: tuple[str, str]) -> list[Any]:
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def test_log_likelihoods_are_the_networks(model: Any) -> None:
    pairs = [("ab ab", " cab"), ("ab", " cab"), ("ab ab", " fed"), ("", "gab")]
    found = HarnessModel(model).loglikelihood(requests(*pairs))
    for (given, scored), (value, _) in zip(pairs, found, strict=True):
        start = model.encode(given) if given else [model.tokenizer.bos_token_id]
        rest = model.tokenizer(given + scored, add_special_tokens=bool(given))["input_ids"]
        ids = rest if given else start + rest
        logits = np.asarray(model.decoder.logits(ids), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(logits[i - 1, ids[i]] for i in range(len(start), len(ids)))
        assert abs(value - expected) < TOLERANCE
    rolled = HarnessModel(model).loglikelihood_rolling(requests(("gab",)))  # type: ignore[arg-type]
    assert abs(rolled[0] - found[-1][0]) < TOLERANCE


def test_a_text_longer_than_the_context_is_cut_in_front(chat_file: Path) -> None:
    with cvxq.load(chat_file, context=64) as model:
        harness = HarnessModel(model)
        long = "ab " * 100
        (value, _), (again, _) = harness.loglikelihood(requests((long, "cab"), ("x" + long, "cab")))
        assert abs(value - again) < TOLERANCE
        with pytest.raises(ArgumentError, match="tokens are to be scored"):
            harness.loglikelihood(requests(("ab", "cab " * 100)))


def test_answers_end_where_the_task_says(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = HarnessModel(model)
    options = {"until": ["~never~"], "max_gen_toks": 6, "do_sample": False}
    made = Instance("generate_until", {}, ("ab", options), 0)
    settings = cvxq.SamplingSettings(temperature=0, max_tokens=6)
    assert harness.generate_until([made]) == [model.generate("ab", settings).text]

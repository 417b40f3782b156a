"""The context length under each of its names."""

from __future__ import annotations

import pytest
from cvxq_format.model_config import attention_options, context_length


@pytest.mark.parametrize(
    "field",
    [
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "seq_length",
        "context_length",
        "model_max_length",
    ],
)
def test_every_name_of_the_context_length(field: str) -> None:
    assert context_length({"hidden_size": 8, field: 64}) == 64


def test_the_usual_name_comes_first() -> None:
    assert context_length({"seq_length": 32, "n_ctx": 48, "max_position_embeddings": 64}) == 64


@pytest.mark.parametrize("value", [None, 0, -1, True, 64.0, "64", [64]])
def test_what_is_no_length_is_passed_over(value: object) -> None:
    assert context_length({"max_position_embeddings": value}) is None
    assert context_length({"max_position_embeddings": value, "n_ctx": 64}) == 64


def test_no_limit() -> None:
    assert context_length({}) is None


def test_capped_scores_ask_for_the_attention_that_caps_them() -> None:
    assert attention_options({"attn_logit_softcapping": 50.0}) == {"attn_implementation": "eager"}
    assert attention_options({"attn_logit_softcapping": None}) == attention_options({}) == {}

"""What every reader needs of a config: the context under each of its names, and experts."""

from __future__ import annotations

from typing import Any

import pytest
from cvxq_format.model_config import (
    attention_options,
    context_length,
    expert_pool,
    routed_share,
    unscaled_length,
)


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


ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("config", "length"),
    [
        # Qwen: the stated length is left as it was; DeepSeek: it is the product already.
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}}, 256),
        ({"rope_scaling": {"type": "yarn", "factor": 4, ORIGINAL: 16}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": 3, ORIGINAL: 16}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": 2.5}}, 160),
        ({"rope_parameters": {"rope_type": "yarn", "factor": None, ORIGINAL: 16}}, 64),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 256),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, ORIGINAL: 32}}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}, "model_type": "gemma3_text"}, 64),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
        # A set for each type of layer.
        ({"rope_parameters": {"full": {"rope_type": "yarn", "factor": 8, ORIGINAL: 16}}}, 128),
        ({"rope_parameters": {"full": {"rope_type": "default"}, "sliding": None}}, 64),
        # These state their whole range.
        ({"rope_scaling": {"type": "longrope", "factor": 32.0, ORIGINAL: 32}}, 64),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, ORIGINAL: 32}}, 64),
        ({ORIGINAL: 32, "rope_scaling": None}, 64),
        ({ORIGINAL: 32, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 128),
        *(
            ({"rope_scaling": {"type": "linear", "factor": factor}}, 64)
            for factor in (0.5, 0, -2, "4", None, float("nan"), float("inf"))
        ),
        ({"rope_scaling": "linear"}, 64),
    ],
)
def test_scaling_stretches_the_context_once(config: dict[str, object], length: int) -> None:
    assert context_length({"max_position_embeddings": 64, **config}) == length


def test_only_dynamic_scaling_leaves_short_texts_alone() -> None:
    def found(kind: str) -> int | None:
        settings = {"rope_type": kind, "factor": 2.0}
        return unscaled_length({"max_position_embeddings": 64, "rope_scaling": settings})

    assert found("dynamic") == 64
    assert found("linear") is found("yarn") is unscaled_length({}) is None


def test_no_limit() -> None:
    assert context_length({}) is None


def test_capped_scores_ask_for_the_attention_that_caps_them() -> None:
    assert attention_options({"attn_logit_softcapping": 50.0}) == {"attn_implementation": "eager"}
    assert attention_options({"attn_logit_softcapping": None}) == attention_options({}) == {}


@pytest.mark.parametrize(
    ("tensor", "pool"),
    [
        ("model.layers.10.mlp.experts.7.w1.weight", "model.layers.10.mlp.experts.*.w1.weight"),
        ("h.1.mlp.experts.gate_up_proj.12.gate", "h.1.mlp.experts.gate_up_proj.*.gate"),
        ("h.1.output_linear.weight.3", "h.1.output_linear.weight.*"),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", None),
        ("model.layers.1.mlp.gate.weight", None),
    ],
)
def test_the_pool_of_an_experts_tensor(tensor: str, pool: str | None) -> None:
    assert expert_pool(tensor) == pool


@pytest.mark.parametrize(
    ("config", "share"),
    [
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, 0.25),
        ({"n_routed_experts": 64, "num_experts_per_tok": 6}, 6 / 64),
        ({"num_experts": 4, "num_experts_per_tok": 8}, 1),
        ({"num_experts": 4}, 1),
        ({"num_experts_per_tok": 2}, 1),
        ({"num_experts": None, "num_experts_per_tok": "2"}, 1),
    ],
)
def test_the_share_of_experts_that_a_token_uses(config: dict[str, Any], share: float) -> None:
    assert routed_share(config) == share


@pytest.mark.parametrize("length", [64, 10**400])
@pytest.mark.parametrize("factor", [4.0, 1e308, 10**400])
def test_numbers_that_no_float_holds(length: int, factor: float) -> None:
    scaled = {"max_position_embeddings": length, "rope_scaling": {"type": "yarn", "factor": factor}}
    found = context_length(scaled)
    assert found is not None
    assert found == 256 if length == 64 and factor == 4 else found >= 2**53
    assert routed_share({"num_experts": 4, "num_experts_per_tok": length}) == 1
    assert routed_share({"num_experts": length, "num_experts_per_tok": 2}) == 2 / min(length, 2**53)

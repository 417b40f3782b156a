"""The specification against transformers' own configurations, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cvxq.lean.errors import NotLeanError
from cvxq.lean.families import DEFAULT_THETA, DEFAULTS, ROPE_FIELDS
from cvxq.lean.rope import read_rope, rope_settings
from cvxq.lean.spec import DecoderSpec, read_spec
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA = {"model_type": "llama"}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(NotLeanError) as caught:
        read_spec(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_json(config: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return parsed


@pytest.fixture(params=sorted(DEFAULTS))
def kind(request: pytest.FixtureRequest) -> str:
    """Run once for each model type."""
    return str(request.param)


def test_missing_fields_mean_what_transformers_takes(kind: str) -> None:
    """An empty config and transformers' own, with every field spelt out, are the same decoder."""
    bare, full = read_spec({"model_type": kind}), read_spec(as_json(AutoConfig.for_model(kind)))
    for name, value in vars(bare).items():
        if name != "rope":
            assert getattr(full, name) == value, name
    if bare.rope is not None and full.rope is not None:
        np.testing.assert_array_equal(bare.rope.inverse_frequencies, full.rope.inverse_frequencies)


def test_the_table_of_defaults(kind: str) -> None:
    """Null in the table stands for a value that transformers derives from other fields."""
    theirs = AutoConfig.for_model(kind).to_dict()
    for name, value in DEFAULTS[kind].items():
        if name == "partial_rotary_factor":
            found = theirs["rope_parameters"][name]
        elif name == "sliding_window" and not theirs.get("use_sliding_window", True):
            continue  # transformers forgets a window that is not used
        else:
            found = theirs.get(name)
        assert value is None or found == value, name
    if kind != "opt":
        assert theirs["rope_parameters"]["rope_theta"] == DEFAULT_THETA.get(kind, 10_000.0)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-betas": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 65536,
        "attention_factor": 1.25,
    },
}
ROPES["yarn-untruncated"] = {**ROPES["yarn"], "rope_type": "yarn", "truncate": False}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", sorted(ROPES))
def test_rope_equals_transformers(name: str, theta: float, head_dim: int) -> None:
    settings = {"rope_type": name, **ROPES[name]}
    context = int(settings.get("original_max_position_embeddings", 32768) * settings["factor"])
    base = {"max_position_embeddings": context, "head_dim": head_dim}
    theirs = transformers.LlamaConfig(**base, rope_theta=theta, rope_scaling=dict(settings))
    expected, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](theirs, torch.device("cpu"))
    for spelling in (
        {"rope_theta": theta, "rope_scaling": settings},
        {"rope_parameters": {**settings, "rope_theta": theta}},
        as_json(theirs),
    ):
        rope = read_spec({**LLAMA, **base, **spelling}).rope
        assert rope is not None
        # Both compute in float32; powers may differ in the last bit, which later steps carry on.
        np.testing.assert_allclose(rope.inverse_frequencies, expected.numpy(), rtol=5e-7)
        assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
        assert rope.rotary_dims == head_dim


def test_the_older_name_of_the_rope_type() -> None:
    old = read_spec({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}).rope
    new = read_spec({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}).rope
    assert old is not None
    assert new is not None
    np.testing.assert_array_equal(old.inverse_frequencies, new.inverse_frequencies)


def test_partial_rotary_and_tables() -> None:
    rope = read_spec({"model_type": "stablelm", "partial_rotary_factor": 0.5}).rope
    assert rope is not None
    assert rope.rotary_dims == 40
    cosine, sine = rope.tables(7)
    angles = np.outer(np.arange(7.0), 10_000.0 ** -(np.arange(20) / 20))
    np.testing.assert_allclose(cosine, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sine, np.sin(angles), atol=1e-6)
    yarn = rope_settings({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, 10_000.0)
    scaled = read_rope({**yarn, "attention_factor": 3.0}, 64, 4096).tables(2)
    assert scaled[0][0].tolist() == [3.0] * 32


def windows(**fields: Any) -> tuple[int | None, ...]:
    small = {"num_hidden_layers": 4, **fields}
    return read_spec(small).windows


def test_windows() -> None:
    assert windows(model_type="llama", sliding_window=None) == (None,) * 4
    assert windows(model_type="mistral") == (4096,) * 4
    assert windows(model_type="mistral", sliding_window=None) == (None,) * 4
    qwen = {"model_type": "qwen2", "sliding_window": 16}
    assert windows(**qwen) == (None,) * 4
    assert windows(**qwen, use_sliding_window=True, max_window_layers=3) == (None,) * 3 + (16,)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(**qwen, use_sliding_window=True, layer_types=kinds) == (16, None) * 2
    assert windows(model_type="gemma2") == (4096, None) * 2
    smol = {"model_type": "smollm3", "sliding_window": 32, "no_rope_layer_interval": 2}
    assert windows(**smol) == (None,) * 4
    assert windows(**smol, use_sliding_window=True) == (None, 32) * 2


def test_layers_without_rotary_positions() -> None:
    smol = {"model_type": "smollm3", "num_hidden_layers": 4}
    assert read_spec(smol).rope_layers == (True, True, True, False)
    assert read_spec({**smol, "no_rope_layers": [0, 1, 1, 0, 1]}).rope_layers == (
        *(False, True, True, False),
    )


def test_every_kind_of_the_tests(lean_kind: str, make_file: Any) -> None:
    """What transformers writes for the variants is read; each differs from the bare default."""
    made = make_file(lean_kind)
    spec = read_spec(json.loads(made.network.config.to_json_string()))
    assert isinstance(spec, DecoderSpec)
    assert (spec.hidden, spec.vocab, spec.layers) == (32, 96, 2)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "mamba"}, "model type 'mamba' has no lean decoder"),
        ({"model_type": None}, "model type None has no lean decoder"),
        ({"new_field": 1}, "config field 'new_field' = 1 of llama is unknown"),
        ({"new_field": None}, "config field 'new_field' = None of llama is unknown"),
        ({"sliding_window": 128}, "'sliding_window' = 128 of llama is unknown"),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' = 50.0 of llama is unknown"),
        ({"is_decoder": 0}, "'is_decoder' = 0 of llama is unknown"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' = 0.5 of llama is unknown"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "of type llama, which ignores it"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"hidden_act": "relu2"}, "activation 'relu2' has no lean decoder"),
        ({"hidden_size": "4096"}, "'hidden_size' is '4096', not a positive integer"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "100 is no multiple of 3 attention"),
        ({"num_key_value_heads": 5}, "32 attention heads are no multiple of 5"),
        ({"rms_norm_eps": -1.0}, "'rms_norm_eps' is -1.0, not a positive number"),
        ({"rms_norm_eps": float("inf")}, "'rms_norm_eps' is inf"),
        ({"tie_word_embeddings": None}, "'tie_word_embeddings' is None, not true or false"),
        ({"rope_theta": True}, "rotary setting 'rope_theta' is True, not a number"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope', implemented: default"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_type is 'mrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rotary setting 'factor' is None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' is 0, not positive"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "x": 1}},
            "rotary setting 'x' is unknown",
        ),
        ({"rope_scaling": [1]}, "rotary settings are [1], not an object"),
        ({"rope_parameters": {"full_attention": {}}}, "rotary settings differ between kinds"),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5.0}},
            "config has both rope_scaling and rope_parameters",
        ),
        ({"head_dim": 5}, "5 rotary dimensions in a head of 5"),
        ({"model_type": "opt", "rope_theta": 1e4}, "'rope_theta' = 10000.0 of opt is unknown"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "'qk_layernorm' = True of stablelm"),
        ({"model_type": "stablelm", "head_dim": 64}, "head_dim 64 is not hidden size / heads"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "layer_types is ['full_attention'], not a list of 32",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["chunked_attention"], "num_hidden_layers": 1},
            "layer type 'chunked_attention' has no lean decoder",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"], "num_hidden_layers": 1},
            "layer_types has sliding_attention, but no sliding window is set",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [1]},
            "no_rope_layers is [1], not a list of 36",
        ),
    ],
)
def test_refusals_say_why(fields: dict[str, Any], reason: str) -> None:
    assert reason in refusal({**LLAMA, **fields})


STRANGE = ["x", [], {}, [[]], [{}], None, True, -1, 0, 1, 2.5, 10**400, math.nan, math.inf]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: repr(value)[:12])
def test_whatever_a_field_holds_is_read_or_refused(kind: str, value: Any) -> None:
    """Nothing else is raised: what is wrong with the value, the transformers path says."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    settings = ["factor", "beta_fast", "mscale", "attention_factor", "rope_type", "rope_theta"]
    configs = [{field: value} for field in [*DEFAULTS[kind], *ROPE_FIELDS, "model_type"]]
    configs += [{"rope_scaling": {**yarn, field: value}} for field in settings]
    for config in configs:
        with contextlib.suppress(NotLeanError):
            read_spec({"model_type": kind, **config})


def test_fields_of_real_checkpoints_that_mean_nothing() -> None:
    smollm2 = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}}
    assert read_spec({**LLAMA, **smollm2, "pretraining_tp": 1, "rope_scaling": None})
    qwen = {"use_mrope": False, "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"}
    assert read_spec({"model_type": "qwen2", **qwen})


def test_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, cvxq.lean.spec, cvxq.lean.weights; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""A config.json whose values cannot be: one line that names file, field, value and reason."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxq
import pytest
import torch
from cvxq.architecture import build_network
from cvxq.config import read_config
from cvxq.errors import InconsistentFileError, UnsupportedModelError

MakeFile = Callable[..., Any]

# Of kinds that have a lean decoder, and of kinds that transformers runs; the value as JSON.
WRONG: list[tuple[str, str, Any, str]] = [
    ("llama", "hidden_size", "big", "expected int, got str"),
    ("llama", "hidden_size", 32.5, "expected int, got float"),
    ("llama", "hidden_size", -32, "negative dimension"),
    ("llama", "num_hidden_layers", None, "expected int, got NoneType"),
    ("llama", "num_attention_heads", 0, "ZeroDivisionError"),
    ("llama", "num_attention_heads", 5, "is not a multiple of"),
    ("llama", "head_dim", "x", "doesn't match any type in (int, NoneType)"),
    ("llama", "rms_norm_eps", "x", "expected float, got str"),
    ("llama", "tie_word_embeddings", "yes", "expected bool, got str"),
    ("llama", "hidden_act", 3, "expected str, got int"),
    ("llama", "rope_scaling", {"rope_type": []}, "unhashable"),
    ("llama", "rope_scaling", {"rope_type": "linear", "factor": "x"}, "TypeError"),
    ("llama", "rope_scaling", "x", "doesn't match any type in"),
    ("qwen2", "layer_types", [[]], "list[str]"),
    ("smollm3", "no_rope_layers", 3, "no_rope_layers"),
    ("mistral", "vocab_size", 10**30, "tensors allow 131072 at most"),
    ("opt", "ffn_dim", [], "expected int, got list"),
    ("gpt2", "n_embd", "big", "expected int, got str"),
    ("gpt2", "n_layer", None, "expected int, got NoneType"),
    ("gpt-neox", "hidden_size", {}, "expected int, got dict"),
    ("gpt-neox", "rope_parameters", [], "doesn't match any type in"),
    ("phi", "id2label", 3, "AttributeError"),
    ("phi", "dtype", "int99", "AttributeError"),
]


def with_field(made: Any, field: str, value: Any) -> dict[str, bytes]:
    settings = json.loads(made.network.config.to_json_string())
    if field in ("rope_theta", "rope_scaling", "rotary_emb_base"):
        del settings["rope_parameters"]
    return {"config.json": json.dumps({**settings, field: value}).encode()}


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(InconsistentFileError) as caught:
        run()
    assert caught.value.exit_code == 4
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


@pytest.mark.parametrize(("kind", "field", "value", "reason"), WRONG)
def test_a_file_with_a_wrong_value(
    kind: str, field: str, value: Any, reason: str, make_file: MakeFile
) -> None:
    files = with_field(make_file(kind), field, value)
    made = make_file(kind, "wrong.cvxq", files=files)
    text = refusal(lambda: cvxq.load(made.path))
    assert text.startswith(f"{made.path}: config.json of the file: {field} is {json.dumps(value)};")
    assert reason in text


@pytest.mark.parametrize("value", [[], "x", {}])
@pytest.mark.parametrize(
    ("kind", "field"), [("llama", "rope_theta"), ("gpt-neox", "rotary_emb_base")]
)
def test_a_wrong_base_of_the_rotary_frequencies(
    kind: str, field: str, value: Any, make_file: MakeFile
) -> None:
    files = with_field(make_file(kind), field, value)
    made = make_file(kind, "wrong.cvxq", files=files)
    assert f"{field} is {json.dumps(value)};" in refusal(lambda: cvxq.load(made.path))


@pytest.mark.parametrize("value", [None, 3, []])
def test_a_model_type_is_a_name(value: Any, make_file: MakeFile) -> None:
    files = with_field(make_file("llama"), "model_type", value)
    made = make_file("llama", "wrong.cvxq", files=files)
    found = f"model_type is {json.dumps(value)}, allowed: a model type's name"
    assert found in refusal(lambda: cvxq.load(made.path))


def test_a_value_that_only_a_tokenizer_of_transformers_looks_at(make_file: MakeFile) -> None:
    files = with_field(make_file("llama"), "pretraining_tp", "x")
    files |= {"tokenizer_config.json": b"{}", "vocab.json": b"{}", "merges.txt": b""}
    made = make_file("llama", "wrong.cvxq", files=files, with_record=True)
    with cvxq.load(made.path) as model:
        assert 'pretraining_tp is "x";' in refusal(lambda: model.tokenizer)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("value", ["x", [[]], ["x"], 2.5, True, {}])
def test_the_tokens_that_end_a_text_are_numbers(kind: str, value: Any, make_file: MakeFile) -> None:
    files = {"generation_config.json": json.dumps({"eos_token_id": value}).encode()}
    made = make_file(kind, files=files)

    def ends() -> None:
        with cvxq.load(made.path) as model:
            model.end_ids  # noqa: B018

    text = refusal(ends)
    assert text.startswith(f"{made.path}: generation_config.json of the file: ")


def test_a_config_that_is_nested_too_deeply(make_file: MakeFile) -> None:
    deep = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    made = make_file("llama", files={"config.json": deep})
    assert "config.json of the file is not JSON" in refusal(lambda: cvxq.load(made.path))


def test_a_name_that_transformers_does_not_know_is_unsupported() -> None:
    settings = {"model_type": "gpt2", "n_layer": 1, "n_embd": 12, "activation_function": "new"}
    with pytest.raises(UnsupportedModelError, match=r'activation_function is "new"; .*KeyError'):
        build_network(settings, "config.json", torch.float32, 100)


def test_a_disk_that_is_full_is_not_blamed_on_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device: '"):
        read_config({"model_type": "llama"}, "config.json")

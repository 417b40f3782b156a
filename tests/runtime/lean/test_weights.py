"""Every slot of a decoder finds its tensor, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cvxq.lean.errors import NotLeanError
from cvxq.lean.spec import DecoderSpec, read_spec
from cvxq.lean.weights import DecoderWeights, Matrix, find_weights, read_floats
from cvxq_format import Reader

MakeFile = Callable[..., Any]


def read(made: Any, **changes: Any) -> tuple[DecoderSpec, DecoderWeights, Reader]:
    reader = Reader(made.path)
    spec = read_spec({**json.loads(reader.file("config.json")), **changes})
    return spec, find_weights(spec, reader), reader


def tensors(value: Any) -> Iterator[str]:
    """All tensor names in a tree of slots."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def test_every_tensor_has_one_slot(lean_kind: str, make_file: MakeFile) -> None:
    made = make_file(lean_kind)
    spec, weights, reader = read(made)
    assert set(tensors(weights)) == set(reader.names)
    state = made.network.state_dict()
    for name in tensors(weights):
        value = read_floats(reader, name)
        np.testing.assert_array_equal(value, state[name].numpy())
    assert len(weights.layers) == spec.layers
    assert weights.head.shape == (96, spec.embedding_width)
    assert weights.layers[1].down.shape == (spec.hidden, spec.ffn)
    assert (weights.head.weight == weights.embedding) == spec.tied


def matrices(weights: DecoderWeights) -> list[Matrix]:
    layer = weights.layers[0]
    found = [layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down]
    return [matrix for matrix in found if matrix is not None]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt-gelu"])
def test_added_biases(kind: str, make_file: MakeFile) -> None:
    _, plain, _ = read(make_file(kind, "plain.cvxq"))
    had = [matrix.bias is not None for matrix in matrices(plain)]
    assert had == ([True] * 3 + [False] * 4 if kind == "qwen2" else [False] * len(had))
    _, biased, _ = read(make_file(kind, add_biases=True))
    assert all(matrix.bias is not None for matrix in matrices(biased))
    assert biased.layers[0].o.bias == biased.layers[0].o.weight.replace("weight", "bias")


def test_the_prefix_may_be_missing(make_file: MakeFile) -> None:
    made = make_file("opt", rename=lambda name: name.removeprefix("model."))
    _, weights, _ = read(made)
    assert weights.embedding == "decoder.embed_tokens.weight"


def test_a_tied_head_may_be_missing(make_file: MakeFile) -> None:
    _, weights, _ = read(make_file("llama-tied", leave_out=("lm_head.weight",)))
    assert weights.head.weight == weights.embedding


def test_the_file_decides_what_is_tied(make_file: MakeFile) -> None:
    _, weights, _ = read(make_file("llama-tied"), tie_word_embeddings=False)
    assert weights.head.weight == weights.embedding
    _, weights, _ = read(make_file("llama"), tie_word_embeddings=True)
    assert weights.head.weight != weights.embedding


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 3}, "needs tensor 'model.layers.2.self_attn.q_proj.weight' and"),
        ({"num_hidden_layers": 1}, "tensor 'model.layers.1."),
        ({"intermediate_size": 40}, r"has shape \(48, 32\), the .* needs \(40, 32\)"),
        ({"attention_bias": True}, "needs tensor 'model.layers.0.self_attn.q_proj.bias'"),
    ],
)
def test_a_file_that_does_not_fit(
    changes: dict[str, Any], reason: str, make_file: MakeFile
) -> None:
    with pytest.raises(NotLeanError, match=reason):
        read(make_file("llama"), **changes)

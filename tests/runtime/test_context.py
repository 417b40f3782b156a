"""How long a text may be: what the model was made for, what was asked for, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cvxq
import numpy as np
import pytest
import torch
from cvxq.errors import ArgumentError, ContextError
from cvxq.sample import SamplingSettings
from cvxq_format import Reader
from cvxq_format.decoder_record import FILE_NAME, parse_record

MakeFile = Callable[..., Any]
IDS = [(token * token + 3) % 96 for token in range(120)]
GREEDY = SamplingSettings(temperature=0)


def old_file(make_file: MakeFile, kind: str, context: int) -> Any:
    """A file whose record has another context than its config.json tells."""
    with Reader(make_file(kind).path) as reader:
        record = parse_record(reader.file(FILE_NAME))
    document = json.dumps(replace(record, context=context).to_json()).encode()
    return make_file(kind, "old.cvxq", files={FILE_NAME: document})


def assert_alike(model: cvxq.Model, network: Any, ids: Sequence[int]) -> None:
    """The logits after `ids` are those of transformers, but for the rounding of packed products."""
    with torch.no_grad():
        expected = network(torch.tensor([ids])).logits[0, -1].numpy()
    found = model.session().resume(ids)
    assert float(np.abs(found - expected).max()) < 0.05 * float(expected.std())


def test_scaling_gives_its_whole_range(make_file: MakeFile) -> None:
    made = make_file("llama-linear")
    with Reader(made.path) as reader:
        assert parse_record(reader.file(FILE_NAME)).context == 128
    with cvxq.load(made.path) as model:
        assert model.context_length == model.full_context == 128
        assert_alike(model, made.network, IDS)


def test_a_record_of_the_unscaled_length_reaches_as_far(make_file: MakeFile) -> None:
    made = old_file(make_file, "llama-linear", 64)
    with cvxq.load(made.path) as model:
        assert model.context_length == 128
        assert_alike(model, made.network, IDS)


@pytest.mark.parametrize("weights", ["packed", "dense"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_shorter_context(
    kind: str, weights: Literal["packed", "dense"], make_file: MakeFile
) -> None:
    with cvxq.load(make_file(kind).path, weights=weights, context=10) as model:
        assert (model.context_length, model.full_context) == (10, 64)
        with pytest.raises(ContextError, match="11 tokens, but the model's context holds 10"):
            model.session().resume(IDS[:11])
        assert len(list(model.session().draw(IDS[:4], GREEDY))) == 7  # the last one is not read


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_a_longer_context_than_the_model_was_made_for(
    weights: Literal["packed", "dense"], make_file: MakeFile
) -> None:
    made = make_file("llama")
    with cvxq.load(made.path, weights=weights, context=120) as model:
        assert (model.context_length, model.full_context) == (120, 64)
        assert_alike(model, made.network, IDS)


@pytest.mark.parametrize("weights", ["packed", "dense"])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_end(
    kind: str, weights: Literal["packed", "dense"], make_file: MakeFile
) -> None:
    path = make_file(kind).path
    with pytest.raises(ArgumentError, match=r"context is 65 tokens, but .* for 64 only"):
        cvxq.load(path, weights=weights, context=65)


@pytest.mark.parametrize("context", [-1, 0, 1, (1 << 24) + 1])
def test_what_is_no_context(context: int, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"context is {context} tokens, allowed: 2 to 16777216"):
        cvxq.load(tmp_path / "no.cvxq", context=context)


def test_dynamic_scaling_is_for_transformers_past_its_original_length(make_file: MakeFile) -> None:
    path = make_file("llama-dynamic").path
    with cvxq.load(path) as model:
        assert model.decoder is None
        assert model.context_length == 128
        assert "dynamic past 64 tokens; a context of 64" in str(model.transformers_reason)
    with cvxq.load(path, context=64) as model:
        assert model.decoder is not None
        assert (model.context_length, model.full_context) == (64, 128)

"""Sizes that a config claims and no tensor bears out cost neither memory nor time."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import cvxq
import pytest
import torch
from cvxq.architecture import build_network
from cvxq.errors import InconsistentFileError

MakeFile = Callable[..., Any]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head_dim", 2**31),
        ("head_dim", 2**40),
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", 2**40),
        ("num_labels", 2**31),
        ("hidden_size", 10**400),
        ("intermediate_size", 2**31),
    ],
)
def test_a_size_without_tensors(field: str, value: int, make_file: MakeFile) -> None:
    settings = json.loads(make_file("llama").network.config.to_json_string())
    files = {"config.json": json.dumps({**settings, field: value}).encode()}
    made = make_file("llama", "large.cvxq", files=files)
    with pytest.raises(InconsistentFileError, match=rf"{field} is {str(value)[:40]}; the file's"):
        cvxq.load(made.path)


GPTJ = {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}


def test_a_table_that_is_too_large_is_refused_before_it_is_made() -> None:
    torch.manual_seed(0)
    tracemalloc.start()
    with pytest.raises(InconsistentFileError, match=r"n_positions is 1099511627776; .* a table of"):
        build_network({**GPTJ, "n_positions": 2**40}, "config.json", torch.float32, 100)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_tables_that_are_too_large_together() -> None:
    with pytest.raises(InconsistentFileError, match=r"tables of more than 256 MB"):
        build_network(
            {**GPTJ, "n_layer": 40, "n_positions": 2**21, "rotary_dim": 8},
            "config.json",
            torch.float32,
            1000,
        )


def test_more_parameters_than_tensors() -> None:
    settings = {**GPTJ, "n_layer": 500, "n_positions": 8}
    with pytest.raises(InconsistentFileError, match="more than 512 parameters"):
        build_network(settings, "config.json", torch.float32, 100)


def test_usual_tables_are_built() -> None:
    network = build_network({**GPTJ, "n_positions": 2048}, "config.json", torch.float32, 100)
    assert all(not buffer.is_meta for _, buffer in network.named_buffers())


def test_no_architecture_is_refused_by_its_own_defaults() -> None:
    from cvxq.claims import too_large
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            settings = kind().to_dict()
        except Exception:  # a config that has no defaults
            continue
        text = settings.get("text_config") or settings
        widest = max(1 << 17, text.get("vocab_size") or 0)
        if refused := list(too_large(settings, widest=widest)):
            found[kind.__name__] = refused
    assert found == {}

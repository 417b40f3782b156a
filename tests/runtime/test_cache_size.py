"""What keys and values take, by a record and by the fields of a config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxq
import pytest
from cvxq.cache_size import CacheSize, cache_size, reach_of
from cvxq.cli.inspect import memory_record
from cvxq.summary import summarize
from cvxq_kernels import cpu

MakeFile = Callable[..., Any]
LIKE = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64}


def held_by_transformers(network: Any, tokens: int) -> int:
    """Bytes of keys and values that a network in float32 keeps of a text."""
    import torch
    from transformers import DynamicCache

    with torch.no_grad():
        cache = network(torch.zeros(1, tokens, dtype=torch.int64), past_key_values=DynamicCache())
    layers = cache.past_key_values.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt", "gpt-neox", "qwen3", "mistral"])
@pytest.mark.parametrize("with_record", [True, False])
def test_sizes_are_those_that_transformers_keeps(
    kind: str, with_record: bool, make_file: MakeFile
) -> None:
    made = make_file(kind, with_record=with_record)
    if not with_record:
        made = make_file(kind, files={"config.json": made.network.config.to_json_string().encode()})
    size = summarize(made.path).cache
    assert size is not None
    held = held_by_transformers(made.network, 20) - held_by_transformers(made.network, 10)
    assert size.bytes_per_token == held / 10


@pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())
def test_sizes_are_those_that_the_native_decoder_holds(make_file: MakeFile) -> None:
    path = make_file("gemma").path  # heads of a whole number of vectors
    size = summarize(path).cache
    with cvxq.load(path, context=300) as model:
        decoder: Any = model.decoder
        decoder.feed([1])
        before = decoder.native.nbytes  # with a block of 64 places
        decoder.feed([1] * 64)
        assert size is not None
        grown = decoder.native.nbytes - before - 64 * size.bytes_per_token
        assert 0 <= grown < 4096 + 192  # what prefetches reach behind a block


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({}, CacheSize(4, 0, None, 4 * 2 * 64 * 4)),
        ({"num_key_value_heads": 1}, CacheSize(4, 0, None, 4 * 2 * 16 * 4)),
        ({"head_dim": 32}, CacheSize(4, 0, None, 4 * 2 * 128 * 4)),
        (
            {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
            CacheSize(1, 0, None, 2 * 64 * 4),
        ),
        (
            {"layer_types": ["sliding_attention", "conv"] * 2, "sliding_window": 8},
            CacheSize(2, 2, 8, 2 * 2 * 64 * 4),
        ),
        ({"num_kv_shared_layers": 1}, CacheSize(3, 0, None, 3 * 2 * 64 * 4)),
        ({"layer_types": ["mamba"] * 4}, CacheSize(0, 0, None, 0)),
        ({"num_attention_heads": None}, None),
        ({"num_hidden_layers": "many"}, None),
    ],
)
def test_layers_without_keys_take_nothing(
    config: dict[str, object], size: CacheSize | None
) -> None:
    assert cache_size({**LIKE, **config}, None) == size


def test_the_largest_context_in_free_memory(make_file: MakeFile) -> None:
    summary = summarize(make_file("llama").path)
    assert summary.cache is not None
    free = summary.file_bytes + 100 * summary.cache.bytes_per_token + 1
    key = "largest_context_in_free_memory"
    assert memory_record(summary, free)[key] == 100
    assert memory_record(summary, 10)[key] == 0
    assert memory_record(summary, None) == {"free_memory_bytes": None, key: None}
    assert CacheSize(0, 0, None, 0).largest_context(1000) is None


def test_how_far_a_model_reaches() -> None:
    config = {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2}}
    assert reach_of(config, None).context == 128
    assert reach_of(config, None).unscaled == 64
    assert reach_of({"n_ctx": 64}, None).unscaled is None
    assert reach_of({}, None).context is None

"""Changes of a JSON document that keep it JSON, most of them, and change what it says."""

from __future__ import annotations

import json
import pickle
from random import Random
from typing import Any

NUMBERS = (
    *(-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 7, 64, 97, 1000, 65536, 2**20, 2**24, 2**31 - 1),
    *(2**31, 2**32, 2**40, 2**53 + 1, 2**63 - 1, 2**64, 10**40, 10**400),
    *(0.5, -0.5, 1e-30, 1e30, 1e308, 1e-320, -0.0, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    "\x1b]0;title\x07\x1b[2J",
    "",
    "*",
    "none",
    "\0",
    "\ud800",
    "a" * 5000,
    "../../etc/passwd",
    "nul\u2028line",
    "{{ 1 }}",
)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [0] * 1000,
    {"a": {"b": []}},
    json.loads("[" * 400 + "]" * 400),
)

# Fields that networks, tokenizers and records know, so that changes hit something.
FIELDS = (
    *("head_dim", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings", "sliding_window"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types"),
    *("num_labels", "id2label", "text_config", "quantization_config", "auto_map", "torch_dtype"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "eos_token_id", "bos_token_id"),
    *("pad_token_id", "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias"),
    *("n_embd", "n_layer", "n_head", "n_positions", "n_inner", "word_embed_proj_dim", "ffn_dim"),
    *("chat_template", "extra_special_tokens", "added_tokens_decoder", "tokenizer_class"),
    *("model_max_length", "additional_special_tokens", "add_bos_token", "add_prefix_space"),
    *("normalizer", "pre_tokenizer", "decoder", "post_processor", "truncation", "padding"),
    *("context", "heads", "kv_heads", "ffn", "window", "softcap", "scale", "rope", "switch"),
    *("experts", "chosen", "count", "rows", "first", "run", "step", "embedding_scale"),
    *("attn_implementation", "_attn_implementation", "use_cache", "is_decoder", "dtype"),
)
TYPES = (
    *("llama", "gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "bloom", "falcon", "mpt", "codegen"),
    *("mamba", "rwkv", "bart", "t5", "gemma3", "gemma3n", "mixtral", "deepseek_v3", "qwen3_next"),
    *("xglm", "phi3", "ctrl", "reformer", "xlnet", "bert", "llama4", "cohere", "dbrx", "jamba"),
)
SCALING: tuple[Any, ...] = (
    {"rope_type": "dynamic", "factor": 1e308},
    {"rope_type": "linear", "factor": 2**40},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2**60},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1e300] * 4},
    {"rope_type": "llama3", "factor": 0.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
)


LARGE = 1 << 20  # characters of JSON that are not multiplied any more
LARGEST = 1 << 24  # and of a document that is not changed any more


def copied(value: Any) -> Any:
    """Return a deep copy of what JSON can hold, several times as fast as copy.deepcopy."""
    return pickle.loads(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside `value`."""
    found = [path]
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:40]):
            found += places(item, (*path, index))
    return found


def value_at(document: Any, path: tuple[Any, ...]) -> Any:
    """Return what lies at `path`."""
    for key in path:
        document = document[key]
    return document


def any_value(rng: Random, old: Any) -> Any:
    """Return something in place of `old`, more often of its type than not."""
    chosen = rng.random()
    if isinstance(old, bool) and chosen < 0.6:
        return not old
    if isinstance(old, (int, float)) and chosen < 0.8:
        near = [old + 1, old - 1, -old, old / 2, old * 2] if abs(old) < 1e300 else []
        if isinstance(old, int) and abs(old) < 10**30:
            near += [old // 2, old * 2, old << 20]
        return rng.choice([*near, *NUMBERS])
    if isinstance(old, str) and chosen < 0.6:
        at = rng.randrange(len(old) + 1)
        return rng.choice([*TEXTS, old[:at], old * 2, old[:at] + chr(rng.randrange(0xD7FF))])
    if isinstance(old, list) and old and chosen < 0.6:
        many = old * (50 if len(json.dumps(old)) < LARGE else 2)
        return rng.choice([old * 2, old[:-1], old[::-1], [*old, old[0]], many])
    return rng.choice(rng.choice([NUMBERS, TEXTS, OTHERS]))


def change(document: Any, rng: Random) -> Any:
    """Return a copy of `document` with one thing changed."""
    document = copied(document)
    found = places(document)
    path = rng.choice(found)
    if not path or rng.random() < 0.02:
        return any_value(rng, document)
    parent, key = value_at(document, path[:-1]), path[-1]
    how = rng.randrange(10)
    if how < 5:
        parent[key] = any_value(rng, parent[key])
    elif how == 5:
        del parent[key]
    elif how == 6:  # one place's value at another
        parent[key] = copied(value_at(document, rng.choice(found)))
    elif isinstance(parent, list):
        parent.insert(key, any_value(rng, parent[key]))
    elif how == 7:
        parent[rng.choice([*TEXTS, *FIELDS, key + "_", str(key).upper()])] = parent.pop(key)
    else:
        name = rng.choice(FIELDS)
        pool = {"rope_scaling": SCALING, "rope_parameters": SCALING}.get(name, NUMBERS)
        parent[name] = rng.choice([*pool, *OTHERS]) if rng.random() < 0.9 else rng.choice(TEXTS)
    return document


def change_number(document: Any, rng: Random) -> Any:
    """Return a copy of `document` with one number a little different, or not so little."""
    document = copied(document)
    numbers = [path for path in places(document) if _is_number(value_at(document, path))]
    if not numbers or not numbers[0]:
        return document
    path = rng.choice(numbers)
    value_at(document, path[:-1])[path[-1]] = any_value(rng, value_at(document, path))
    return document


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def written(document: Any, rng: Random) -> bytes:
    """Return the document as JSON, now and then not quite."""
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    how = rng.random()
    if how < 0.02:  # a key that appears twice
        return data.replace(b"{", b'{"hidden_size": 7, ', 1)
    if how < 0.03:
        return b"[" * 100_000 + data
    if how < 0.04:
        return b"\xef\xbb\xbf" + data
    return data[: rng.randrange(len(data))] if how < 0.05 and data else data

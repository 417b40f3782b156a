"""How long a model's texts may be, and what the keys and values of their tokens take.

All decoders on a CPU keep them in float32, those outside a sliding window, too: a chat may take
back what it has read, and then they are seen again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cvxq_format.decoder_record import DecoderRecord
from cvxq_format.model_config import context_length, unscaled_length

_BYTES = 4  # float32
_WITH_KEYS = ("full_attention", "sliding_attention", "chunked_attention", "attention")


@dataclass(frozen=True)
class CacheSize:
    """The keys and values of one text.

    layers: that keep any; windowed: those of them that look back no further than `window` tokens;
    bytes_per_token: of all layers together.
    """

    layers: int
    windowed: int
    window: int | None
    bytes_per_token: int

    def largest_context(self, free_bytes: int) -> int | None:
        """Return how many tokens fit into free memory, None if they take none."""
        return max(0, free_bytes) // self.bytes_per_token if self.bytes_per_token else None


@dataclass(frozen=True)
class Reach:
    """The most tokens of a text that a model was made for, None where not stated.

    unscaled: that its own decoders run, where dynamic scaling leaves longer texts to transformers.
    """

    context: int | None
    unscaled: int | None = None


def full_context(config: Mapping[str, Any], record: DecoderRecord) -> int:
    """Return the most tokens that a model with this config.json and record was made for."""
    return context_length(config) or record.context


def reach_of(config: Mapping[str, Any], record: DecoderRecord | None) -> Reach:
    """Return how far a model with this config.json and record reaches."""
    context = context_length(config) if record is None else full_context(config, record)
    unscaled = unscaled_length(config)
    return Reach(context, unscaled if unscaled != context else None)


def cache_size(config: Mapping[str, Any], record: DecoderRecord | None) -> CacheSize | None:
    """Return what the keys and values of a model take; None where its config.json does not say."""
    return _of_config(config) if record is None else _of_record(record)


def _of_record(record: DecoderRecord) -> CacheSize:
    windows = [layer.attention.window for layer in record.layers]
    seen = [window for window in windows if window is not None]
    return CacheSize(len(windows), len(seen), max(seen, default=None), bytes_per_token(record))


def bytes_per_token(record: DecoderRecord) -> int:
    """Return what keys and values of one token take in float32."""
    return 2 * record.kv_heads * record.head_dim * _BYTES * len(record.layers)


def _of_config(config: Mapping[str, Any]) -> CacheSize | None:
    """As `_of_record`, by the fields' usual names."""
    layers = _number(config, "num_hidden_layers", "n_layer")
    heads = _number(config, "num_attention_heads", "n_head")
    hidden = _number(config, "hidden_size", "n_embd")
    if layers is None or heads is None or hidden is None:
        return None
    kinds = config.get("layer_types")
    if not isinstance(kinds, list):
        kinds = ["full_attention"] * layers
    kinds = kinds[: layers - (_number(config, "num_kv_shared_layers") or 0)]
    kept = [kind for kind in kinds if kind in _WITH_KEYS]
    windowed = sum(kind == "sliding_attention" for kind in kept)
    key_heads = _number(config, "num_key_value_heads") or heads
    width = 2 * (_number(config, "head_dim") or hidden // heads)
    window = _number(config, "sliding_window") if windowed else None
    return CacheSize(len(kept), windowed, window, key_heads * width * _BYTES * len(kept))


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None

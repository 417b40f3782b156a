"""What a model's config.json says that every reader needs, in whichever spelling."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# One per family of architectures; a config that has several means the same by all of them.
_CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "context_length",
    "model_max_length",
)
_LARGEST = 2**53  # of any number here: a file may hold some that no float can
_EXPERTS_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)|(?<=\.)\d+(?=(\.(gate|up))?$)")

# Rotary settings that stretch the places of a text, by the name of their kind.  longrope and llama3
# state the whole range.
_STRETCHING = ("linear", "dynamic", "yarn")
# Their linear scaling names the factor alone, and max_position_embeddings is the product already.
_STATE_THE_PRODUCT = ("gemma3", "gemma3_text")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens that the model was made for, or None where none are stated.

    With linear, dynamic or YaRN scaling that is the original length times its factor, unless more
    is stated.  config: a parsed config.json; of a model that also sees or hears, its part about
    text.
    """
    stated = _stated_length(config)
    if stated is None:
        return None
    return max([stated, *(_stretched(config, stated, s) for s in _rope_settings(config))])


def unscaled_length(config: Mapping[str, Any]) -> int | None:
    """Return the longest text that dynamic scaling leaves alone, None for a model without it.

    In a longer one every token changes the angles of all.
    """
    kinds = [_kind(settings) for settings in _rope_settings(config)]
    return _stated_length(config) if "dynamic" in kinds else None


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a model's configuration says of texts: a part of its own, or all of it."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def routed_share(config: Mapping[str, Any]) -> float:
    """Return which share of a layer's experts a token is routed to; 1 where nothing is stated."""
    counts = (_length(config.get(field)) for field in _EXPERTS_FIELDS)
    count = next((count for count in counts if count is not None), None)
    chosen = _length(config.get("num_experts_per_tok"))
    return 1.0 if count is None or chosen is None else min(1.0, chosen / count)


def expert_pool(tensor: str) -> str | None:
    """Return the name of an expert's tensor with * for the expert's number; None for any other.

    All tensors of that name do the same for the experts of one layer (FORMAT.md, 7.6).
    """
    number = _EXPERT.search(tensor)
    return None if number is None else f"{tensor[: number.start()]}*{tensor[number.end() :]}"


def _stated_length(config: Mapping[str, Any]) -> int | None:
    lengths = (_length(config.get(field)) for field in _CONTEXT_FIELDS)
    return next((length for length in lengths if length is not None), None)


def _length(value: Any) -> int | None:
    is_length = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return min(value, _LARGEST) if is_length else None


def _rope_settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary settings, one set for all layers or one for each type of layer."""
    given = [config.get("rope_scaling"), config.get("rope_parameters")]
    found = [settings for settings in given if isinstance(settings, Mapping)]
    nested = [part for settings in found for part in settings.values()]
    return found + [part for part in nested if isinstance(part, Mapping)]


def _kind(settings: Mapping[str, Any]) -> Any:
    return settings.get("rope_type", settings.get("type"))


def _stretched(config: Mapping[str, Any], stated: int, settings: Mapping[str, Any]) -> int:
    """The length that one set of rotary settings stretches the original one to."""
    kind, factor = _kind(settings), settings.get("factor")
    if kind not in _STRETCHING or not isinstance(factor, int | float) or not 1 < factor < math.inf:
        return stated
    name = "original_max_position_embeddings"
    original = _length(settings.get(name)) or _length(config.get(name))
    if original is None and kind == "linear" and config.get("model_type") in _STATE_THE_PRODUCT:
        return stated
    return round((original or stated) * min(factor, _LARGEST))


def attention_options(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what transformers has to be told beside a config, by the names of its arguments.

    Where attention scores are soft-capped (Gemma 2), transformers 5.16 takes a faster attention
    that leaves the cap out, unless it is asked for the plain one.
    """
    return {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}

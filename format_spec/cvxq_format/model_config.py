"""What a model's config.json says that every reader needs, in whichever spelling."""

from __future__ import annotations

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


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens that the model was made for, or None where none are stated.

    config: a parsed config.json; of a model that also sees or hears, its part about text.
    """
    for field in _CONTEXT_FIELDS:
        value = config.get(field)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def attention_options(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what transformers has to be told beside a config, by the names of its arguments.

    Where attention scores are soft-capped (Gemma 2), transformers 5.16 takes a faster attention
    that leaves the cap out, unless it is asked for the plain one.
    """
    return {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}

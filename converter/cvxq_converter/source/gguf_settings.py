"""What a GGUF file says about the computation, put where transformers' reader leaves it out."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cvxq_converter.errors import ConversionError

_FREQUENCIES = "rope_freqs.weight"  # what each pair's frequency is divided by
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192  # of the models before they were scaled
_SCALED_QUERIES = {("gemma2", 46), ("gemma3", 62)}  # 27 B: by hidden size, not by head size
_FIELDS = {  # where the configuration has such a field
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_READ_OR_WITHOUT_EFFECT = {  # read by transformers for every architecture, or about no computation
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "use_parallel_residual",
    "vocab_size",
}


def apply_settings(
    config: Any,
    settings: Mapping[str, Any],
    read: Callable[[str], np.ndarray],
    tensors: Container[str],
    name: str,
) -> None:
    """Complete `config`, which transformers made of the file, by the file's own settings.

    read: a tensor by its name in the file; tensors: the names. Raises ConversionError for a
    setting that the configuration cannot express.
    """
    architecture = settings["general.architecture"]
    start = f"{architecture}."
    own = {key.removeprefix(start): v for key, v in settings.items() if key.startswith(start)}
    left = {key: value for key, value in own.items() if key not in _READ_OR_WITHOUT_EFFECT}
    for key, field in _FIELDS.items():
        if key in left and hasattr(config, field):
            setattr(config, field, left.pop(key))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (architecture, own.get("block_count")) in _SCALED_QUERIES:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    for key in ("attention.key_length", "attention.value_length"):
        if left.get(key) == size:
            del left[key]
    _apply_rope(config, left, size)
    if _FREQUENCIES in tensors:
        _apply_frequencies(config, read(_FREQUENCIES), size, name)
    for key, value in left.items():
        raise ConversionError(
            f"{name}: {start}{key} is {value!r}, which transformers' {config.model_type} cannot "
            "express; convert the original checkpoint"
        )


def _rope_of(config: Any) -> dict[str, Any]:
    """The rotary settings, those of the full attention where there are two sorts."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def _apply_rope(config: Any, left: dict[str, Any], size: int) -> None:
    """Take what is understood of the rotary settings out of `left`, into the configuration."""
    rope = _rope_of(config)
    if not rope:
        return
    if "rope.freq_base" in left:
        rope["rope_theta"] = left.pop("rope.freq_base")
    turned = size * rope.get("partial_rotary_factor", 1.0)
    if left.get("rope.dimension_count") == int(turned):
        del left["rope.dimension_count"]
    kind = left.get("rope.scaling.type", "none")
    factor = left.get("rope.scaling.factor", 1.0)
    original = left.get("rope.scaling.original_context_length")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and original is not None:
        rope |= {"rope_type": "yarn", "factor": factor}
        rope |= {"original_max_position_embeddings": original}
    elif kind != "none":
        return
    for key in ("type", "factor", "original_context_length"):
        left.pop(f"rope.scaling.{key}", None)


def _apply_frequencies(config: Any, factors: np.ndarray, size: int, name: str) -> None:
    """Express the factors (R/2,) that divide the frequencies as Llama 3's scaling, or refuse."""
    rope = _rope_of(config)
    if np.all(factors == 1):
        return
    rope |= {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    rope |= {"original_max_position_embeddings": _LLAMA3_CONTEXT}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(np.arange(0, size, 2) / size)
    if factors.shape != plain.shape or not np.allclose(plain / scaled.numpy(), factors, rtol=1e-3):
        raise ConversionError(
            f"{name}: the factors of {_FREQUENCIES} are not those of Llama 3's scaling; "
            "convert the original checkpoint"
        )

"""Numbers of a live network: what its modules hold, read from them or found by running them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cvxq_format.decoder_record import Activation, Rope
from cvxq_format.model_config import context_length, unscaled_length
from torch import Tensor, nn

from cvxq_converter.errors import NotDescribedError

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}


def context_of(config: Any) -> int:
    """Return the most tokens that one record describes: dynamic scaling goes beyond it."""
    values = config.to_dict()
    found = unscaled_length(values) or context_length(values)
    if found is None:
        raise NotDescribedError("a model without a longest text is not described")
    return found


def activation_of(module: Any) -> Activation:
    """Return which known function a module computes, by trying it."""
    points = torch.linspace(-8, 8, 321, dtype=torch.float64)
    with torch.no_grad():
        values = module(points)
    for name, function in _ACTIVATIONS.items():
        if torch.allclose(values, function(points), rtol=0, atol=1e-6):
            return name
    raise NotDescribedError(f"the activation {type(module).__name__} is not described")


def norm_epsilon(module: Any) -> float:
    """Return what a norm adds under its root."""
    for attribute in ("variance_epsilon", "eps"):
        if hasattr(module, attribute):
            return float(getattr(module, attribute))
    raise NotDescribedError(f"the norm {type(module).__name__} is not described")


def is_layer_norm(module: Any) -> bool:
    """Whether a norm subtracts the mean."""
    return isinstance(module, nn.LayerNorm)


def rope_of(module: Any, layer_type: str | None) -> Rope:
    """Return the angles of a rotary module, those for layers of `layer_type` where it tells.

    A module that scales with the length of the text only beyond the context is described as it is
    within; one with two sets of frequencies is asked for both.
    """
    prefix = f"{layer_type}_" if hasattr(module, f"{layer_type}_inv_freq") else ""
    kind, settings = module.rope_type, module.config.rope_parameters
    if prefix:
        kind, settings = kind[layer_type], settings[layer_type]
    factor = float(getattr(module, f"{prefix}attention_scaling"))
    if kind == "longrope":
        switch = int(settings["original_max_position_embeddings"])
        short, long = (_asked(module, prefix, length) for length in (switch, switch + 1))
        if short == long:
            return Rope(short, factor)
        return Rope(short, factor, switch, long, factor)
    name = "original_inv_freq" if "dynamic" in kind else "inv_freq"
    return Rope(_numbers(getattr(module, prefix + name)), factor)


def _asked(module: Any, prefix: str, length: int) -> tuple[float, ...]:
    """The frequencies that a rotary module uses in a text of `length` tokens."""
    frequencies = getattr(module, f"{prefix}inv_freq")
    layer_type = (prefix[:-1],) if prefix else ()
    with torch.no_grad():
        places = torch.tensor([[length - 1]], device=frequencies.device)
        module(torch.zeros(1, device=frequencies.device), places, *layer_type)
    return _numbers(getattr(module, f"{prefix}inv_freq"))


def _numbers(values: Tensor) -> tuple[float, ...]:
    """The numbers of a tensor, each in the fewest digits that give it back in float32."""
    return tuple(float(str(np.float32(value))) for value in values.float().cpu().tolist())


def scale_of(module: Any, attribute: str, dtype: torch.dtype) -> float:
    """Return a factor that a module holds, a tensor rounded to `dtype` as where it is used."""
    value = getattr(module, attribute)
    return float(value.to(dtype)) if isinstance(value, Tensor) else float(value)


def end_tokens(network: Any) -> tuple[int, ...]:
    """Every token that ends a text, of the generation settings and of the configuration."""
    found: set[int] = set()
    for settings in (getattr(network, "generation_config", None), network.config):
        tokens = getattr(settings, "eos_token_id", None)
        found |= {int(token) for token in _listed(tokens)}
    return tuple(sorted(found))


def _listed(tokens: Any) -> list[Any]:
    if tokens is None:
        return []
    return list(tokens) if isinstance(tokens, list | tuple) else [tokens]

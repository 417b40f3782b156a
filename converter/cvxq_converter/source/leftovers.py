"""Tensors of a checkpoint that its network has no use for: named, never dropped in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cvxq_converter.errors import ConversionError
from cvxq_converter.source.experts import stack_of, stacked_names
from cvxq_converter.source.source import Source

_WRAPPING = re.compile(r"(^|\.)language_model\.")  # in names of the text part of a larger model
_SHOWN = 3


def leftover_notice(source: Source, network: Any, names: Mapping[str, str]) -> str | None:
    """Say which tensors are left out, None if there are none.

    names: network parameter → checkpoint tensor, from `source_names`.
    Raises ConversionError if one that is not zero belongs to a layer that the network does have: a
    trained bias that config.json does not mention, a scale that nothing applies.
    """
    if source.is_gguf:  # which is refused where it has more than the network
        return None
    used = {_core(stored) for name in names.values() for stored in (name, stack_of(name))}
    used |= {_core(name) for name in (*network.state_dict(), *stacked_names(network))}
    prefix = f"{network.base_model_prefix}."
    used |= {name.removeprefix(prefix) for name in used}
    left = [key for key in source.tensors if _core(key).removeprefix(prefix) not in used]
    for key in left:
        weight = f"{key.rpartition('.')[0]}.weight"
        scales_activations = weight in source.scales and key.endswith("_scale")
        has_layer = weight in source.tensors and weight not in left
        if has_layer and not scales_activations and source.read(key).count_nonzero():
            raise ConversionError(
                f"{source.name}: {key} is not zero, but the network that config.json describes has "
                "no such tensor; correct config.json (attention_bias or mlp_bias, if it is a bias)"
            )
    if not left:
        return None
    shown = ", ".join(left[:_SHOWN]) + (", …" if len(left) > _SHOWN else "")
    count = f"{len(left)} tensors" if len(left) > 1 else "a tensor"
    return f"{source.name}: {count} that the network does not use left out: {shown}"


def _core(name: str) -> str:
    return _WRAPPING.sub(r"\1", name).removeprefix("model.")

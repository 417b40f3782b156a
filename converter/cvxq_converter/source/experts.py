"""Mixtures of experts in a checkpoint: cut into matrices, named, and told from their routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cvxq.experts import SourceNames, experts_of, stack_of, stacked_names, unstack
from torch import Tensor, nn

from cvxq_converter.source.blocks import hollow
from cvxq_converter.source.source import Source

__all__ = [
    "expert_names",
    "expert_parameters",
    "expert_values",
    "experts_of",
    "hollow_stacks",
    "pools_of",
    "router_weights",
    "stack_of",
    "stacked_names",
    "unstack",
]


def expert_names(source: Source, network: Any) -> dict[str, str]:
    """Pair each parameter of an unstacked network with its name in the file.

    That of the checkpoint, or for a matrix that it stacks with others, see `SourceNames`; what the
    checkpoint lacks, or stores in a form of its own, keeps the network's name.
    """
    names = {name: name for name, _ in network.named_parameters(remove_duplicate=False)}
    if not source.has_names_of_network:
        table = SourceNames(network)
        for tensor in source.tensors:
            names |= {place: stored for stored, place in table.parts(tensor).items()}
    return names


def hollow_stacks(network: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stand-ins without memory for the stacks of a network before `unstack`, by name."""
    stacks = stacked_names(network)
    return {
        name: hollow(parameter, dtype, "cpu")
        for name, parameter in network.named_parameters()
        if name in stacks
    }


def expert_parameters(network: Any) -> dict[str, nn.Parameter]:
    """What the experts of an unstacked network hold, by name in the network."""
    return {
        f"{name}.{index}.{key}": parameter
        for name, experts in experts_of(network).items()
        for index in range(experts.num_experts)
        for key, parameter in getattr(experts, str(index)).named_parameters()
    }


def expert_values(weights: Mapping[str, Tensor], network: Any) -> dict[str, dict[str, Tensor]]:
    """What the experts of an unstacked network are, views of a checkpoint's weights.

    By tensor of the checkpoint and parameter. Empty unless it has them all, each as it is needed:
    transformers then knows what to make of them, or what is wrong.
    """
    table, wanted = SourceNames(network), expert_parameters(network)
    views = {tensor: table.views(tensor, value) for tensor, value in weights.items()}
    shapes = {name: value.shape for found in views.values() for name, value in found.items()}
    if shapes != {name: parameter.shape for name, parameter in wanted.items()}:
        return {}
    return {tensor: found for tensor, found in views.items() if found}


def router_weights(network: Any) -> set[int]:
    """The ids of what chooses experts and weighs shared ones: too small, and too much depends on
    it, to be quantized.

    That is every matrix beside the experts of a layer with a row for each of them, or with one.
    """
    found = set()
    for name, experts in experts_of(network).items():
        block, _, held = name.rpartition(".")
        for key, parameter in network.get_submodule(block).named_parameters():
            rows = len(parameter) if parameter.ndim == 2 else 0
            if rows in (1, experts.num_experts) and not key.startswith(f"{held}."):
                found.add(id(parameter))
    return found


def pools_of(network: Any) -> dict[int, tuple[str, bool]]:
    """By id of an expert's weight: the pool of equal matrices, and whether stored in × out."""
    return {
        id(module.weight): (f"{name}.{role}", experts.is_transposed)
        for name, experts in experts_of(network).items()
        for index in range(experts.num_experts)
        for role, module in getattr(experts, str(index)).named_children()
        if isinstance(module, nn.Linear)
    }

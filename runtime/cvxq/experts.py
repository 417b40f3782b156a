"""Mixtures of experts, a matrix at a time: each expert's products are `nn.Linear` modules.

transformers stacks the matrices of a layer's experts in one parameter and computes through an
interface that others may implement.  `unstack` cuts the stacks into the modules of an `Expert`
each, named as most checkpoints name them, and has them run by the implementation below.  So
whatever can be done to a linear layer can be done to one expert: hold it packed, hook it, multiply
by it only where tokens are routed to it.

`SourceNames` says which tensor of a checkpoint, or of a file made of it, belongs where.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "cvxq"
_STACKS = ("gate_up_proj", "up_proj", "down_proj")  # and their biases, with _bias
_LISTED = re.compile(r"(.+)\.(\d+)(?:\.(gate|up))?")  # a matrix cut from a source's stack


def stacked_names(network: nn.Module) -> dict[str, tuple[str, str, str]]:
    """What transformers calls the stacks → the module that had it, and the parts of its name."""
    return {
        f"{name}.{stack}{end}": (name, stack, end)
        for name in experts_of(network)
        for stack in _STACKS
        for end in ("", "_bias")
    }


def stack_of(tensor: str) -> str:
    """The source's tensor that a matrix of a file was cut from, or the same name."""
    listed = _LISTED.fullmatch(tensor)
    return listed[1] if listed else tensor


class Expert(nn.Module):
    """One expert's products; its activation is that of the module which holds it."""

    gate_proj: nn.Linear | None
    up_proj: nn.Linear
    down_proj: nn.Linear

    def linears(self) -> list[nn.Linear]:
        """The products that there are."""
        return [p for p in (self.gate_proj, self.up_proj, self.down_proj) if p is not None]


def experts_of(network: nn.Module) -> dict[str, Any]:
    """The modules of a network that hold experts and run through transformers' interface."""
    return {
        name: module
        for name, module in network.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    }


def unstack(network: PreTrainedModel) -> None:
    """Cut the stacked parameters of all experts into linear layers that share their memory."""
    found = experts_of(network)
    for module in found.values():
        for index, expert in enumerate(_experts(module)):
            module.add_module(str(index), expert)
        for name in _STACKS:
            for stack in (name, f"{name}_bias"):
                if stack in module._parameters:
                    delattr(module, stack)
        module.num_experts = index + 1
    if found:
        network.set_experts_implementation(IMPLEMENTATION)


def _experts(module: Any) -> Iterator[Expert]:
    first = module.gate_up_proj if module.has_gate else module.up_proj
    for index in range(len(first)):
        expert = Expert()
        up, up_bias = _slice(module, "gate_up_proj" if module.has_gate else "up_proj", index)
        expert.gate_proj = None
        if module.has_gate:
            gate, up = _halves(module, up)
            gate_bias, up_bias = (None, None) if up_bias is None else _halves(module, up_bias)
            expert.gate_proj = _linear(gate, gate_bias)
        expert.up_proj = _linear(up, up_bias)
        expert.down_proj = _linear(*_slice(module, "down_proj", index))
        yield expert.train(module.training)


def _slice(module: Any, name: str, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix (N, K) of a stack, and its bias (N,)."""
    weight = getattr(module, name).data[index]
    bias = getattr(module, f"{name}_bias").data[index] if module.has_bias else None
    return weight.T if module.is_transposed else weight, bias


def _halves(module: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the gate and of what it gates."""
    if module.is_concatenated:
        gate, up = rows.chunk(2)
        return gate, up
    return rows[::2], rows[1::2]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum (T, H) of what each token's experts make of it.

    hidden_states: (T, H); top_k_index: (T, k) int64; top_k_weights: (T, k).
    An expert without tokens still runs where hooks wait for one of its products.
    """
    places = top_k_index.reshape(-1)
    order = torch.argsort(places, stable=True)
    tokens = order // top_k_index.shape[1]
    counts = torch.bincount(places, minlength=self.num_experts).tolist()
    made = []
    for index, routed in enumerate(tokens.split(counts)):
        expert = getattr(self, str(index))
        if len(routed) or any(p._forward_pre_hooks or p._forward_hooks for p in expert.linears()):
            made.append(_run(self, expert, hidden_states[routed]))
    weighted = torch.cat(made) * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    summed = weighted[back].view(*top_k_index.shape, -1).sum(1)
    return summed.to(hidden_states.dtype)


def _run(module: Any, expert: Expert, x: torch.Tensor) -> torch.Tensor:
    inner = expert.up_proj(x)
    if expert.gate_proj is None:
        inner = module.act_fn(inner)
    else:
        both = (expert.gate_proj(x), inner)
        takes_turns = not module.is_concatenated
        joined = torch.stack(both, -1).flatten(-2) if takes_turns else torch.cat(both, -1)
        inner = module._apply_gate(joined)
    out: torch.Tensor = expert.down_proj(inner)
    # the oldest transformers that is allowed knows no such norm
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


def _only_stacks(operation: Any) -> bool:
    """Whether an operation of transformers' makes (E, N, K) of matrices, gates above the others."""
    if isinstance(operation, Concatenate):
        return operation.dim == 1
    return isinstance(operation, MergeModulelist)


class SourceNames:
    """Where the tensors of a checkpoint belong in an unstacked network.

    transformers' own table of what it renames and joins is asked.  What a checkpoint stacks itself
    is stored a matrix at a time: expert 3 of NAME as NAME.3, or, where gate and up are joined,
    NAME.3.gate and NAME.3.up; so are biases.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        """Read the table for this network."""
        table = get_model_conversion_mapping(network)
        self._renamings = [item for item in table if isinstance(item, WeightRenaming)]
        self._converters = [item for item in table if isinstance(item, WeightConverter)]
        self._prefix = network.base_model_prefix
        self._experts = experts_of(network)
        self._names = set(network.state_dict())
        self._stacks = stacked_names(network)
        self._known = dict.fromkeys([*self._names, *self._stacks], True)

    def parts(self, tensor: str) -> dict[str, str]:
        """What a tensor of the source becomes: name in a file → parameter.

        Empty for a tensor that has no place of its own: it is joined with others, or not used.
        """
        place, pattern = self._renamed(tensor)
        if tensor in self._names:
            return {tensor: tensor}
        if place not in self._stacks:
            return {tensor: place} if place in self._names and pattern is None else {}
        if "*" in (pattern or ""):
            return {tensor: self._of_expert(tensor, place, str(pattern))}
        name, stack, _ = self._stacks[place]
        roles = ("gate", "up") if stack == "gate_up_proj" else (None,)
        return {
            f"{tensor}.{index}" + (f".{role}" if role else ""): self._cut(place, index, role)
            for index in range(self._experts[name].num_experts)
            for role in roles
        }

    def views(self, tensor: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a tensor of the source holds of experts, by parameter: it, or views of a stack.

        Empty where it holds nothing of them, or where transformers does more than to stack.
        """
        place, pattern = self._renamed(tensor)
        if tensor in self._names or place not in self._stacks:
            return {}
        name, stack, end = self._stacks[place]
        experts = self._experts[name]
        if pattern is not None:
            is_plain = "*" in pattern and not experts.is_transposed
            is_plain = is_plain and all(map(_only_stacks, self._converter(pattern).operations))
            return {self._of_expert(tensor, place, pattern): value} if is_plain else {}
        found = {}
        for index, one in enumerate(value):
            rows = one.T if experts.is_transposed and not end else one
            if stack == "gate_up_proj":
                gate, up = _halves(experts, rows)
                found[self._cut(place, index, "gate")] = gate
                found[self._cut(place, index, "up")] = up
            else:
                found[self._cut(place, index, None)] = rows
        return found

    def place(self, tensor: str) -> str | None:
        """The parameter that a tensor of a file belongs to; None if the table does not tell."""
        if tensor in self._names:
            return tensor
        listed = _LISTED.fullmatch(tensor)
        if listed is not None:
            place, _ = self._renamed(listed[1])
            if place in self._stacks:
                return self._cut(place, int(listed[2]), listed[3])
        found = self.parts(tensor).get(tensor)
        if found is None and tensor.endswith(".bias"):  # that a layer has gained
            weight = self.place(tensor.removesuffix("bias") + "weight")
            return weight and weight.removesuffix("weight") + "bias"
        return found

    def _renamed(self, tensor: str) -> tuple[str, str | None]:
        place, pattern = rename_source_key(
            tensor, self._renamings, self._converters, self._prefix, self._known
        )
        return place, pattern

    def _of_expert(self, tensor: str, place: str, pattern: str) -> str:
        """The matrix of a tensor that holds one expert's, by the pattern that it matched."""
        converter = self._converter(pattern)
        found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), tensor)
        joined = len(converter.source_patterns) > 1
        role = ("gate", "up")[converter.source_patterns.index(pattern)] if joined else None
        return self._cut(place, int(found[1]) if found else 0, role)

    def _converter(self, pattern: str) -> WeightConverter:
        return next(c for c in self._converters if pattern in c.source_patterns)

    def _cut(self, place: str, index: int, role: str | None) -> str:
        name, stack, end = self._stacks[place]
        return f"{name}.{index}.{role or stack.removesuffix('_proj')}_proj.{end[1:] or 'weight'}"

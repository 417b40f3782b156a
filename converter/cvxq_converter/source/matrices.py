"""The matrices inside a network: what can be quantized, under which names, used by which modules.

A matrix is the weight of an `nn.Linear`, of GPT-2's `Conv1D` (stored inputs × outputs) or of the
input embedding. Modules that share one parameter (a tied head) share one matrix. The products of
experts are linear layers, too (`experts.unstack`); what chooses experts is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cvxq_converter.errors import ConversionError
from cvxq_converter.source.experts import pools_of, router_weights

_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


@dataclass(frozen=True)
class Matrix:
    """One weight matrix that can be quantized, shared by every module that uses it."""

    name: str  # of the weight in the checkpoint
    module_name: str  # first module of the network that holds it
    kind: str  # "linear", "conv1d" or "embedding"
    parameter: nn.Parameter
    aliases: tuple[str, ...]  # checkpoint names of its other uses, the tied head first of all
    bias_name: str | None  # of the bias, present or to be gained; None if it multiplies nothing
    has_bias: bool
    source_orientation: str  # "out_in" or "in_out" (Conv1D)
    input_module_name: str | None  # module that multiplies an input by it; None for a pure table
    rows_are_tokens: bool  # the input embedding or the output head
    pool: str | None = None  # of the matrices that do the same for the other experts of a layer

    @property
    def weight(self) -> Tensor:
        """The weight as (outputs N, inputs K), a view of the parameter."""
        return self.parameter.data.T if self.kind == "conv1d" else self.parameter.data


def find_matrices(network: Any, names: Mapping[str, str] | None = None) -> list[Matrix]:
    """List the quantizable matrices: every linear layer, and the input embedding.

    names: network parameter → checkpoint tensor, from `source_names`; None keeps network names.
    Position embeddings stay out: they are small, and each row serves one position only, so there
    is nothing to trade. Convolutions over a few places and vectors (norms, biases) stay out, too.
    Raises ConversionError for weights it does not know how to treat, those of experts first.
    """
    routers, pools = router_weights(network), pools_of(network)
    users = _matrix_users(network, set(pools))
    known = routers.union(id(parameter) for parameter, _ in users.values())
    _refuse_unknown_weights(network, known)
    head = network.get_output_embeddings()
    found = []
    for key, (parameter, uses) in users.items():
        if key not in routers:
            matrix = _describe(parameter, uses, names or {}, head)
            found.append(_of_expert(matrix, *pools[key]) if key in pools else matrix)
    return found


def names_by_pool(matrices: Iterable[Matrix], among: Container[str]) -> list[list[str]]:
    """The names of the matrices of each pool of experts, as far as they are `among` others."""
    pools: dict[str, list[str]] = {}
    for matrix in matrices:
        if matrix.pool is not None and matrix.name in among:
            pools.setdefault(matrix.pool, []).append(matrix.name)
    return list(pools.values())


def _of_expert(matrix: Matrix, pool: str, is_transposed: bool) -> Matrix:
    """Say that a matrix is one of many alike, none of which gains a bias."""
    orientation = "in_out" if is_transposed else "out_in"
    bias_name = matrix.bias_name if matrix.has_bias else None
    return replace(matrix, pool=pool, source_orientation=orientation, bias_name=bias_name)


_Use = tuple[str, nn.Module]


def _matrix_users(network: Any, experts: set[int]) -> dict[int, tuple[nn.Parameter, list[_Use]]]:
    """Map id(parameter) to the parameter and the (name, module) pairs that use it."""
    embedding = network.get_input_embeddings()
    users: dict[int, tuple[nn.Parameter, list[_Use]]] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | Conv1D) or module is embedding:
            weight = cast(nn.Parameter, module.weight)
            if _EXPERTS.search(name) and id(weight) not in experts:
                raise ConversionError(_experts_message(name))
            users.setdefault(id(weight), (weight, []))[1].append((name, module))
    return users


def _describe(
    parameter: nn.Parameter, uses: list[_Use], names: Mapping[str, str], head: nn.Module | None
) -> Matrix:
    tables = [use for use in uses if isinstance(use[1], nn.Embedding)]
    products = [use for use in uses if not isinstance(use[1], nn.Embedding)]
    first = (tables or products)[0]
    kind = "embedding" if tables else "conv1d" if isinstance(first[1], Conv1D) else "linear"
    others = [name for name, _ in [*products, *tables] if name != first[0]]
    checkpoint = [names.get(f"{name}.weight", f"{name}.weight") for name in (first[0], *others)]
    stored = checkpoint[0]
    bias_name, has_bias = None, False
    if products:
        name, module = products[0]
        has_bias = module.bias is not None
        weight_name = names.get(f"{name}.weight", f"{name}.weight")
        if tables and weight_name == stored:
            weight_name = f"{name}.weight"
        gained = weight_name.removesuffix("weight") + "bias"
        bias_name = names.get(f"{name}.bias", gained)
    return Matrix(
        name=stored,
        module_name=first[0],
        kind=kind,
        parameter=parameter,
        aliases=tuple(dict.fromkeys(alias for alias in checkpoint[1:] if alias != stored)),
        bias_name=bias_name,
        has_bias=has_bias,
        source_orientation="in_out" if kind == "conv1d" else "out_in",
        input_module_name=products[0][0] if products else None,
        rows_are_tokens=bool(tables) or any(module is head for _, module in products),
    )


def _refuse_unknown_weights(network: Any, known: set[int]) -> None:
    """Tables of positions and convolutions over a few places are left as they are: small."""
    left = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding | nn.Conv1d)}
    unknown = {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in known | left
    }
    for name, parameter in unknown.items():
        if _EXPERTS.search(name) or parameter.ndim == 3:
            raise ConversionError(_experts_message(name.rpartition(".")[0]))
    for name, parameter in unknown.items():
        shape = "×".join(map(str, parameter.shape))
        raise ConversionError(
            f"{name} ({shape}): a weight outside nn.Linear, Conv1D and embeddings; "
            "this architecture is not supported"
        )


def _experts_message(module: str) -> str:
    return (
        f"module {module}: its experts do not run through transformers' interface for experts; "
        "a mixture of this kind is not supported"
    )

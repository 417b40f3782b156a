"""What a config.json claims of sizes, held against the tensors that the file really has.

A config is a few bytes that may ask for a million layers, or for tables of gigabytes.  Most sizes
cost nothing before tensors fill them, because parameters are built without memory.  What does cost
time or memory is bounded here: how often something is built, by the number of tensors, and the
tables that modules compute for themselves, by `allowance`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cvxq_format import Reader
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cvxq.errors import InconsistentFileError

_REPEATED = re.compile(
    r"(^|_)(n|num)_(\w+_)?(layers?|blocks?|stages?|stacks?|labels)(_|$)|_(layers|depth)$"
)
_WIDE = re.compile(r"(size|dim|heads?|embd|inner|width|rank|hidden|channels|experts)$|^d_\w+$")
_LENGTH = re.compile(r"window|chunk|block|cache|batch|context|seq|pos")  # of texts, not of tensors
_FEWEST = 512  # layers, experts and the like, that any file may have
_NARROWEST = 1 << 17  # of any other size; tables of it take no memory to speak of
_TABLE_BYTES = 128 << 20  # of one table, as it is computed
_TABLES_BYTES = 256 << 20  # of all tables of a network


def check_claims(settings: Mapping[str, Any], reader: Reader, file: str) -> None:
    """Raise InconsistentFileError for a size in a config.json that no tensor of the file bears out.

    file: what to call the config.json in errors.
    """
    entries = [reader.entry(name) for name in reader.names]
    counted = max(_FEWEST, len(entries) + len(reader.aliases))
    widest = max([_NARROWEST, *(size for entry in entries for size in entry.shape)])
    for name, value, most in too_large(settings, counted, widest):
        raise InconsistentFileError(
            f"{file}: {name} is {value!s:.40}; the file's tensors allow {most} at most"
        )


def too_large(
    settings: Mapping[str, Any], counted: int = _FEWEST, widest: int = _NARROWEST
) -> Iterator[tuple[str, float, int]]:
    """Yield the sizes in a config.json that are too large: name, value, and the most allowed.

    counted: of what is built one by one; widest: of a dimension.
    """
    for name, value in _numbers(settings):
        if _REPEATED.search(name):
            most = counted
        elif _WIDE.search(name) and not _LENGTH.search(name):
            most = widest
        else:
            continue
        if value > most:
            yield name, value, most


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


@contextmanager
def allowance(parameters: int) -> Iterator[None]:
    """Raise InconsistentFileError where the modules built in this context take too much.

    parameters: how many of them a file can fill.
    """
    register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer
    most = max(_FEWEST, 4 * parameters)  # tied ones and missing biases count, too
    left = {"parameters": most, "bytes": _TABLES_BYTES}

    def count_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        left["parameters"] -= 1
        _check(left["parameters"] >= 0, f"more than {most} parameters")
        register_parameter(self, name, param)

    def count_buffer(
        self: nn.Module, name: str, tensor: torch.Tensor | None, persistent: bool = True
    ) -> None:
        if tensor is not None and not tensor.is_meta:
            left["bytes"] -= tensor.nbytes
            _check(left["bytes"] >= 0, f"tables of more than {_TABLES_BYTES >> 20} MB")
        register_buffer(self, name, tensor, persistent)

    nn.Module.register_parameter = count_parameter  # type: ignore[method-assign]
    nn.Module.register_buffer = count_buffer  # type: ignore[method-assign]
    try:
        with _Foreseen():
            yield
    finally:
        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
        nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]


class _Foreseen(TorchDispatchMode):
    """Tries every operation without memory first, and refuses one whose result is too large."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        makes = any(argument.name == "device" for argument in func._schema.arguments)
        if (makes and not _on_meta(kwargs)) or any(not tensor.is_meta for tensor in given):
            for result in _without_memory(func, args, {**kwargs, **_device(makes)}):
                _check(result.nbytes <= _TABLE_BYTES, f"a table of {result.nbytes:.3g} bytes")
        return func(*args, **kwargs)


def _on_meta(kwargs: Mapping[str, Any]) -> bool:
    return torch.device(kwargs.get("device") or "cpu").type == "meta"


def _device(makes: bool) -> dict[str, Any]:
    return {"device": torch.device("meta")} if makes else {}


def _without_memory(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """What an operation would return, without memory; nothing where that needs the values."""
    try:
        moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        made = func(*moved[0], **moved[1])
    except (NotImplementedError, RuntimeError):
        return []
    return [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]


def _check(holds: bool, found: str) -> None:
    if not holds:
        raise InconsistentFileError(f"{found}, more than the file's tensors need")

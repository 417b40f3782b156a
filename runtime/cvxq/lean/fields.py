"""Configuration fields, checked for type and range as they are read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cvxq.lean.errors import NotLeanError

LARGEST_COUNT = 2**31 - 1  # what sizes in native code hold
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Fields:
    """Values by field name; what is wrong raises NotLeanError."""

    values: Mapping[str, Any]

    def count(self, name: str, default: int | None = None, *, zero: bool = False) -> int:
        """Return a positive integer (or zero, if allowed); null counts as `default`."""
        value = self.values.get(name)
        if value is None:
            value = default
        if type(value) is not int or not (0 if zero else 1) <= value <= LARGEST_COUNT:
            raise NotLeanError(f"config field {name!r} is {short(value)}, not a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise NotLeanError(f"config field {name!r} is {short(value)}, not a positive number")
        return float(value)

    def optional(self, name: str) -> float | None:
        """Return a positive finite number, or None where the field is null or absent."""
        return None if self.values.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """Return a boolean."""
        value = self.values[name]
        if not isinstance(value, bool):
            raise NotLeanError(f"config field {name!r} is {short(value)}, not true or false")
        return value

    def activation(self, name: str) -> Activation:
        """Return the activation function's name."""
        value = self.values[name]
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise NotLeanError(f"activation {short(value)} has no lean decoder")
        return _ACTIVATIONS[value]


def short(value: object) -> str:
    """Return `repr(value)`, cut to a length that fits a line."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

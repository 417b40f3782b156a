"""Linear, Conv1D and Embedding modules whose weights stay packed.

A module is turned into its packed form in place: the object, its other attributes and its place
in the network remain, and only the class changes, to one that stands right above the plain class
in the method resolution order.  So a subclass with its own forward (OPT's positions, Gemma's
scaled embedding) still calls `super().forward` and meets the packed one.  Code that reaches for
`module.weight` itself meets a `LazyWeight`, which knows shape, dtype and device for nothing and
expands when it is computed with: always right, though slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cvxq_kernels import PackedWeight
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D


class LazyWeight(torch.Tensor):
    """A tensor that is expanded from its packed form whenever an operation needs its values."""

    packed: PackedWeight
    flipped: bool

    @staticmethod
    def __new__(cls, packed: PackedWeight, dtype: torch.dtype, flipped: bool) -> LazyWeight:
        """Stand for `packed` in `dtype`; `flipped` presents (N, K) as (K, N), as Conv1D does."""
        shape = packed.shape[::-1] if flipped else packed.shape
        self: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device
        )
        self.packed = packed
        self.flipped = flipped
        return self

    def expand_weight(self) -> torch.Tensor:
        """Return the values as a plain tensor."""
        dense = self.packed.dense(self.dtype)
        return dense.t() if self.flipped else dense

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def expand(value: Any) -> Any:
            return value.expand_weight() if isinstance(value, LazyWeight) else value

        return func(*tree_map(expand, args), **tree_map(expand, kwargs or {}))


class _PackedModule(nn.Module):
    """What the packed modules share: the weight, and following `.to(device or dtype)`."""

    packed: PackedWeight
    flipped = False

    def hold(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        """Compute with `packed`, expanded to `dtype`, in place of the parameter `weight`."""
        self._parameters.pop("weight", None)
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "weight", LazyWeight(packed, dtype, self.flipped))

    @property
    def _dtype(self) -> torch.dtype:
        return self.__dict__["weight"].dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=self._dtype, device=self.packed.device))
        self.hold(self.packed.to(moved.device), moved.dtype)
        return self


class PackedLinear(_PackedModule, nn.Linear):
    """`nn.Linear` that expands its (N, K) weight for each call and keeps nothing of it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input (…, K) · Wᵀ + bias, (…, N)."""
        return functional.linear(input, self.packed.dense(self._dtype), self.bias)


class PackedConv1D(_PackedModule, Conv1D):
    """GPT-2's Conv1D, whose parameter is (K, N), over a packed (N, K) weight."""

    flipped = True
    bias: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (…, K) · Wᵀ + bias, (…, N)."""
        return functional.linear(x, self.packed.dense(self._dtype), self.bias)


class PackedEmbedding(_PackedModule, nn.Embedding):
    """`nn.Embedding` that expands only the rows looked up."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return rows `input` (…) of the weight, (…, K)."""
        return self.packed.rows(input, self._dtype)


_KINDS: tuple[tuple[type[nn.Module], type[_PackedModule]], ...] = (
    (nn.Linear, PackedLinear),
    (Conv1D, PackedConv1D),
    (nn.Embedding, PackedEmbedding),
)


def can_pack(module: nn.Module) -> bool:
    """Tell whether `module` has a packed form."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False  # rescales its own rows while looking them up
    return any(isinstance(module, plain) for plain, _ in _KINDS)


def pack_module(module: nn.Module, packed: PackedWeight, dtype: torch.dtype) -> None:
    """Turn `module` into its packed form, computing in `dtype` with `packed` as its weight."""
    plain, form = next(kind for kind in _KINDS if isinstance(module, kind[0]))
    own = type(module)
    new = form if own is plain else type(f"Packed{own.__name__}", (own, form), {})
    module.__class__ = new
    module.hold(packed, dtype)  # type: ignore[operator]

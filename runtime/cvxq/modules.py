"""Linear, Conv1D and Embedding modules whose weights stay packed.

A module is turned into its packed form in place: the object, its other attributes and its place
in the network remain, and only the class changes, to one that stands right above the plain class
in the method resolution order.  So a subclass with its own forward (OPT's positions, Gemma's
scaled embedding) still calls `super().forward` and meets the packed one.  Code that reaches for
`module.weight` itself meets a `LazyWeight`, which knows shape, dtype and device for nothing and
expands when it is computed with: always right, though slow.

On a CUDA device the weight is a `GpuWeight`, multiplied as it lies; the packed weight that it was
made from stays where the file was mapped.  On a CPU, float32 inputs are multiplied by a
`cvxq_kernels.cpu.Matrix` where the module has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from cvxq_kernels import PackedWeight, UnsupportedWeightError, cpu
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from cvxq import cuda

if TYPE_CHECKING:
    from cvxq_kernels.gpu import GpuWeight

    AnyWeight = PackedWeight | GpuWeight

_on_devices: WeakKeyDictionary[PackedWeight, dict[torch.device, AnyWeight]] = WeakKeyDictionary()


def place(packed: PackedWeight, device: torch.device) -> AnyWeight:
    """Return `packed` on `device`, arranged for the GPU kernels where they serve it.

    Modules that share a packed weight share what is returned.
    """
    if device.type != "cuda":
        return packed.to(device)
    found = _on_devices.setdefault(packed, {})
    if device not in found:
        found[device] = _arrange(packed, device)
    return found[device]


def has_kernel(packed: PackedWeight, device: torch.device) -> bool:
    """Tell whether products with `packed` on `device` need not expand it on a GPU each time."""
    return device.type != "cuda" or not isinstance(place(packed, device), PackedWeight)


def _arrange(packed: PackedWeight, device: torch.device) -> AnyWeight:
    if not cuda.runs_kernels(device):
        return packed.to(device)
    from cvxq_kernels.gpu import GpuWeight

    try:
        return GpuWeight.from_packed(packed, device)
    except UnsupportedWeightError:  # stored transposed, or several matrices in one
        return packed.to(device)


def _linear(x: torch.Tensor, module: _PackedModule, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x (…, K) · Wᵀ + bias: as the weight lies where a kernel can, else expanded."""
    packed = module.packed
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    if module.native is not None and not needs_gradient and x.dtype == torch.float32:
        rows = module.native.matmul(x.detach().reshape(-1, x.shape[-1]).numpy(), module.exact)
        y = torch.from_numpy(rows).view(*x.shape[:-1], -1)
        return y if bias is None else y.add_(bias)
    if isinstance(packed, PackedWeight) or needs_gradient or x.dtype == torch.float64:
        return functional.linear(x, packed.dense(module._dtype), bias)
    y = packed.matmul(x.reshape(-1, x.shape[-1]), bias)
    return y.view(*x.shape[:-1], y.shape[-1])


class LazyWeight(torch.Tensor):
    """A tensor that is expanded from its packed form whenever an operation needs its values."""

    packed: AnyWeight
    flipped: bool

    @staticmethod
    def __new__(cls, packed: AnyWeight, dtype: torch.dtype, flipped: bool) -> LazyWeight:
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
    """What the packed modules share: the weight, and following `.to(device or dtype)`.

    exact: multiply in float32 throughout, on a CPU.
    """

    packed: AnyWeight
    source: PackedWeight
    native: cpu.Matrix | None
    flipped = False
    exact = False

    def hold(self, packed: AnyWeight, dtype: torch.dtype, native: cpu.Matrix | None = None) -> None:
        """Compute in `dtype` with `packed` in place of the parameter `weight`.

        native: the same matrix in the form of the CPU's kernels, which then compute.
        """
        self._parameters.pop("weight", None)
        if isinstance(packed, PackedWeight):
            object.__setattr__(self, "source", packed)
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "native", native)
        object.__setattr__(self, "weight", LazyWeight(packed, dtype, self.flipped))

    @property
    def _dtype(self) -> torch.dtype:
        return self.__dict__["weight"].dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=self._dtype, device=self.packed.device))
        stays = moved.device.type == "cpu" and moved.dtype == torch.float32
        native = self.native if stays else None
        self.hold(place(self.source, moved.device), moved.dtype, native)
        return self

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight that a product reads."""
        return self.packed.nbytes if self.native is None else self.native.nbytes


class PackedLinear(_PackedModule, nn.Linear):
    """`nn.Linear` over a packed (N, K) weight; without a kernel, expanded for each call."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input (…, K) · Wᵀ + bias, (…, N)."""
        return _linear(input, self, self.bias)


class PackedConv1D(_PackedModule, Conv1D):
    """GPT-2's Conv1D, whose parameter is (K, N), over a packed (N, K) weight."""

    flipped = True
    bias: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (…, K) · Wᵀ + bias, (…, N)."""
        return _linear(x, self, self.bias)


class PackedEmbedding(_PackedModule, nn.Embedding):
    """`nn.Embedding` that expands only the rows looked up."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return rows `input` (…) of the weight, (…, K)."""
        if self.native is None:
            return self.packed.rows(input, self._dtype)
        rows = torch.from_numpy(self.native.rows(input.reshape(-1).numpy()))
        return rows.view(*input.shape, -1)


_KINDS: tuple[tuple[type[nn.Module], type[_PackedModule]], ...] = (
    (nn.Linear, PackedLinear),
    (Conv1D, PackedConv1D),
    (nn.Embedding, PackedEmbedding),
)


def packed_modules(network: nn.Module) -> list[_PackedModule]:
    """Return the modules of `network` whose weights are packed."""
    return [module for module in network.modules() if isinstance(module, _PackedModule)]


def can_pack(module: nn.Module) -> bool:
    """Tell whether `module` has a packed form."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False  # rescales its own rows while looking them up
    return any(isinstance(module, plain) for plain, _ in _KINDS)


def pack_module(
    module: nn.Module,
    packed: PackedWeight,
    dtype: torch.dtype,
    native: cpu.Matrix | None = None,
    device: torch.device | None = None,
) -> None:
    """Turn `module` into its packed form, computing in `dtype` with `packed` as its weight.

    native: the same matrix in the form of the CPU's kernels, which then compute.
    device: where to compute, None: where `packed` is.
    """
    plain, form = next(kind for kind in _KINDS if isinstance(module, kind[0]))
    own = type(module)
    new = form if own is plain else type(f"Packed{own.__name__}", (own, form), {})
    module.__class__ = new
    module.hold(packed, dtype, native)  # type: ignore[operator]
    if device is not None:
        module.hold(place(packed, device), dtype, native)  # type: ignore[operator]

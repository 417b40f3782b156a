"""What a layer of vLLM multiplies by: packed matrices side by side, behind two operators of torch.

`torch.ops.cvxq.product` and `torch.ops.cvxq.look_up` say what they return without computing it, so
that compiled models may hold them.  A model names its matrices to them by a number in a tensor, not
in the code: layers of one shape then are the same code, which is compiled once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from cvxq_format import Codebook, CompandedTensor
from cvxq_kernels import PackedWeight, UnsupportedWeightError, cpu
from cvxq_kernels.cpu.matrix import matmul_many
from torch.nn import functional

from cvxq import cuda

if TYPE_CHECKING:
    from cvxq_kernels.gpu import GpuWeight


@dataclass(frozen=True)
class Part:
    """A matrix of a product, of which only the first `outputs` rows are asked for.

    weight: with its codebook, or the values (N, K) of one that is not packed: float16, float32,
    or uint16 for bfloat16.
    """

    weight: CompandedTensor | npt.NDArray[np.generic]
    codebook: Codebook | None
    outputs: int

    def packed(self) -> PackedWeight | torch.Tensor:
        """Return the matrix for a GPU, still on the CPU."""
        if isinstance(self.weight, CompandedTensor):
            assert self.codebook is not None
            return PackedWeight.from_tensor(self.weight, self.codebook)
        if self.weight.dtype == np.uint16:
            return torch.from_numpy(self.weight.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(self.weight)

    def native(self, pool: cpu.Pool) -> cpu.Matrix:
        """Return the matrix for the kernels of a CPU."""
        if isinstance(self.weight, CompandedTensor):
            assert self.codebook is not None
            return cpu.Matrix.from_tensor(self.weight, self.codebook, pool=pool)
        return cpu.Matrix.from_dense(self.weight, pool=pool)


class Product(ABC):
    """Matrices with the same inputs, their outputs side by side, then zeros up to `outputs`.

    `handle` is the number that the operators know it by, for as long as it lives.
    """

    def __init__(self, parts: Sequence[Part], outputs: int) -> None:
        """Let the operators know a product with `outputs` columns."""
        self.outputs = outputs
        self.handle = next(_handles)
        self._wanted = [part.outputs for part in parts]
        _products[self.handle] = self

    @abstractmethod
    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (M, K) · Wᵀ, (M, outputs), in x's type."""

    @abstractmethod
    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return rows `ids` (M,) of the only matrix, (M, K)."""

    def _joined(self, products: Sequence[torch.Tensor]) -> torch.Tensor:
        """Put side by side what is asked for of each part's product."""
        wanted = [y[:, :n] for y, n in zip(products, self._wanted, strict=True)]
        missing = self.outputs - sum(self._wanted)
        if missing:
            wanted.append(products[0].new_zeros(len(products[0]), missing))
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted, 1)


class CpuProduct(Product):
    """A product by the native kernels, in float32; exact: without rounding activations."""

    def __init__(self, parts: Sequence[Part], outputs: int, pool: cpu.Pool, exact: bool) -> None:
        """Repack all parts for the kernels."""
        super().__init__(parts, outputs)
        self._exact = exact
        self._matrices = [part.native(pool) for part in parts]

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (M, K) · Wᵀ, (M, outputs), in x's type."""
        padded = _padded(x.float(), self._matrices[0].shape[1])
        found = matmul_many(self._matrices, padded.numpy(), self._exact)
        return self._joined([torch.from_numpy(y) for y in found]).to(x.dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return rows `ids` (M,) of the only matrix, (M, K)."""
        return torch.from_numpy(self._matrices[0].rows(ids.numpy())).to(dtype)


class GpuProduct(Product):
    """A product by Triton's kernels, expanded where they do not take a matrix."""

    def __init__(
        self, parts: Sequence[Part], outputs: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Move all parts to `device`; what is expanded there is of type `dtype`."""
        super().__init__(parts, outputs)
        packed = [part.packed() for part in parts]
        self._heights = [weight.shape[0] for weight in packed]
        self._weights = _arranged(packed, device, dtype)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (M, K) · Wᵀ, (M, outputs), in x's type."""
        x = _padded(x, self._weights[0].shape[1])
        found = [
            functional.linear(x, weight) if isinstance(weight, torch.Tensor) else weight.matmul(x)
            for weight in self._weights
        ]
        if self._heights == self._wanted and self.outputs == sum(self._wanted):
            return found[0] if len(found) == 1 else torch.cat(found, 1)
        return self._joined(torch.cat(found, 1).split(self._heights, 1))

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return rows `ids` (M,) of the only matrix, (M, K)."""
        weight = self._weights[0]
        if isinstance(weight, torch.Tensor):
            return functional.embedding(ids, weight).to(dtype)
        return weight.rows(ids, dtype)


_handles = count()
_products: WeakValueDictionary[int, Product] = WeakValueDictionary()


def _padded(x: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return x (M, K) with zeros for the inputs that a share has beyond those asked for."""
    missing = inputs - x.shape[1]
    return functional.pad(x, (0, missing)) if missing else x


def _arranged(
    weights: Sequence[PackedWeight | torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Sequence[GpuWeight | torch.Tensor]:
    """Return the weights on a GPU: all in one for the kernels, or each expanded."""
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    if len(packed) == len(weights) and cuda.runs_kernels(device):
        from cvxq_kernels.gpu import GpuWeight

        try:
            return [GpuWeight.fused(packed, device)]
        except UnsupportedWeightError:  # stored transposed
            pass
    return [
        weight.to(device).dense(dtype)
        if isinstance(weight, PackedWeight)
        else weight.to(device, dtype)
        for weight in weights
    ]


def _product(x: torch.Tensor, handle: torch.Tensor, outputs: int) -> torch.Tensor:
    flat = _products[int(handle)].matmul(x.reshape(-1, x.shape[-1]))
    return flat.contiguous().view(*x.shape[:-1], outputs)  # as compiled code expects


def _look_up(
    ids: torch.Tensor, handle: torch.Tensor, inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    flat = _products[int(handle)].rows(ids.reshape(-1), dtype)
    return flat[:, :inputs].contiguous().view(*ids.shape, inputs)


def _no_product(x: torch.Tensor, handle: torch.Tensor, outputs: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _no_look_up(
    ids: torch.Tensor, handle: torch.Tensor, inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    return ids.new_empty(*ids.shape, inputs, dtype=dtype)


_library = torch.library.Library("cvxq", "DEF")
for _schema, _compute, _describe in (
    ("product(Tensor x, Tensor handle, SymInt outputs) -> Tensor", _product, _no_product),
    (
        "look_up(Tensor ids, Tensor handle, SymInt inputs, ScalarType dtype) -> Tensor",
        _look_up,
        _no_look_up,
    ),
):
    _library.define(_schema)
    _name = _schema.partition("(")[0]
    _library.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cvxq::{_name}", _describe, lib=_library)

"""A decoder's weights on a torch device, brought there one tensor at a time.

Matrices stay packed where the caller can compute with packed ones (`Pack`), else they are expanded
once.  Matrices that share their input are fused: q/k/v and gate/up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from cvxq_format import CompandedTensor, RawTensor, Reader
from cvxq_kernels import PackedWeight
from cvxq_kernels.decode import Norm
from torch.nn import functional

from cvxq.lean import weights as names
from cvxq.lean.spec import DecoderSpec
from cvxq.tensors import raw_to_torch


class Weight(Hashable, Protocol):
    """A matrix W (N, K) on its device, packed or not."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x (M, K) · Wᵀ + bias (N,): (M, N) in the type of x."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows ids (M,) int64 of W: (M, K)."""


# Makes one weight (sum of N_i, K) of packed ones; ValueError where it cannot.
Pack = Callable[[Sequence[PackedWeight]], Weight]


class DenseWeight:
    """An expanded matrix; values: (N, K)."""

    def __init__(self, values: torch.Tensor) -> None:
        """Hold `values`."""
        self.values = values

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        return self.values.nbytes

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x (M, K) · Wᵀ + bias (N,): (M, N)."""
        return functional.linear(x, self.values, bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows ids (M,) of W: (M, K)."""
        return functional.embedding(ids, self.values)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear map of one or several weights (N_i, K) that share their input; bias (Σ N_i,)."""

    weights: tuple[Weight, ...]
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs (M, Σ N_i) for x (M, K)."""
        if len(self.weights) == 1:
            return self.weights[0].matmul(x, self.bias)
        y = torch.cat([weight.matmul(x) for weight in self.weights], dim=1)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer; see `weights.LayerWeights` for the norms."""

    qkv: Linear
    o: Linear
    up: Linear  # gate and up where the block is gated
    down: Linear
    qk_norms: tuple[Norm, Norm] | None
    before_attention: Norm | None
    after_attention: Norm | None
    before_ffn: Norm | None
    after_ffn: Norm | None


@dataclass(frozen=True, eq=False)
class TorchWeights:
    """All weights of a decoder; positions: (context + offset, hidden) float32 or None."""

    embedding: Weight
    positions: torch.Tensor | None
    project_in: Linear | None
    project_out: Linear | None
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Linear

    def matrix_bytes(self) -> int:
        """Bytes of device memory that the matrices take, shared ones once."""
        return sum(weight.nbytes for weight in {*self.multiplied(), self.embedding})

    def bytes_per_token(self) -> int:
        """Bytes of matrices that predicting one token reads: all, but one row of embeddings."""
        return sum(weight.nbytes for weight in self.multiplied())

    def multiplied(self) -> list[Weight]:
        """All weights that some input is multiplied by, in a fixed order."""
        linears = [self.project_in, self.project_out, self.head]
        for layer in self.layers:
            linears += [layer.qkv, layer.o, layer.up, layer.down]
        found = [weight for linear in linears if linear for weight in linear.weights]
        return list(dict.fromkeys(found))


def load_weights(
    spec: DecoderSpec,
    found: names.DecoderWeights,
    reader: Reader,
    device: torch.device,
    dtype: torch.dtype,
    pack: Pack | None = None,
) -> TorchWeights:
    """Bring the weights `found` in the file to `device`; expanded ones take `dtype`."""
    loader = _Loader(spec, reader, device, dtype, pack)
    layers = tuple(loader.layer(layer) for layer in found.layers)
    (embedding,) = loader.weights([found.embedding])
    head = loader.linear(found.head) if found.head.weight != found.embedding else None
    if head is None:
        head = Linear((embedding,), loader.bias([found.head]))
    return TorchWeights(
        embedding=embedding,
        positions=None if found.positions is None else loader.floats(found.positions),
        project_in=None if found.project_in is None else loader.linear(found.project_in),
        project_out=None if found.project_out is None else loader.linear(found.project_out),
        layers=layers,
        final_norm=loader.norm(found.final_norm),
        head=head,
    )


@dataclass(frozen=True)
class _Loader:
    spec: DecoderSpec
    reader: Reader
    device: torch.device
    dtype: torch.dtype
    pack: Pack | None

    def floats(self, name: str) -> torch.Tensor:
        """Return a small tensor as float32 on the device."""
        return torch.tensor(names.read_floats(self.reader, name), device=self.device)

    def linear(self, *matrices: names.Matrix) -> Linear:
        """Return one linear map of all `matrices`, in order."""
        return Linear(self.weights([matrix.weight for matrix in matrices]), self.bias(matrices))

    def weights(self, tensors: Sequence[str]) -> tuple[Weight, ...]:
        """Return matrices that share their input, as one if all are packed or none is."""
        values = [self.reader.read(name) for name in tensors]
        packed = [self._packed(value) for value in values if isinstance(value, CompandedTensor)]
        if self.pack is not None and len(packed) == len(values):
            with contextlib.suppress(ValueError):
                return (self.pack(packed),)
        if self.pack is not None and packed and len(values) > 1:
            return tuple(weight for name in tensors for weight in self.weights([name]))
        return (DenseWeight(torch.cat([self._dense(value) for value in values])),)

    def bias(self, matrices: Sequence[names.Matrix]) -> torch.Tensor | None:
        """Return the biases of `matrices` side by side, zeros where one has none."""
        if all(matrix.bias is None for matrix in matrices):
            return None
        parts = [
            torch.zeros(matrix.shape[0], device=self.device)
            if matrix.bias is None
            else self.floats(matrix.bias)
            for matrix in matrices
        ]
        return torch.cat(parts).to(self.dtype)

    def norm(self, found: names.Norm | None) -> Norm | None:
        """Return a norm; the offset that some architectures add is added to the weight."""
        if found is None:
            return None
        weight = None if found.weight is None else self.floats(found.weight)
        if weight is not None and self.spec.norm_offset:
            weight += self.spec.norm_offset
        bias = None if found.bias is None else self.floats(found.bias)
        return Norm(self.spec.norm, weight, bias, self.spec.norm_eps)

    def layer(self, found: names.LayerWeights) -> Layer:
        """Return one layer."""
        q_norm, k_norm = self.norm(found.q_norm), self.norm(found.k_norm)
        gate = () if found.gate is None else (found.gate,)
        return Layer(
            qkv=self.linear(found.q, found.k, found.v),
            o=self.linear(found.o),
            up=self.linear(*gate, found.up),
            down=self.linear(found.down),
            qk_norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
            before_attention=self.norm(found.before_attention),
            after_attention=self.norm(found.after_attention),
            before_ffn=self.norm(found.before_ffn),
            after_ffn=self.norm(found.after_ffn),
        )

    def _packed(self, value: CompandedTensor) -> PackedWeight:
        return PackedWeight.from_tensor(value, self.reader.codebook(value.codebook))

    def _dense(self, value: CompandedTensor | RawTensor) -> torch.Tensor:
        if isinstance(value, CompandedTensor):
            return self._packed(value).to(self.device).dense(self.dtype)
        return raw_to_torch(value).to(self.device, self.dtype)

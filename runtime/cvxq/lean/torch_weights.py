"""A decoder's weights on a torch device, brought there one tensor at a time.

On CUDA packed matrices stay packed (`GpuWeight`); on other devices, or when asked for, they are
expanded once.  Matrices that share their input are fused: q/k/v and gate/up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from cvxq_format import CompandedTensor, RawTensor, Reader
from cvxq_kernels import PackedWeight
from cvxq_kernels.decode import Norm
from torch.nn import functional

from cvxq.lean import weights as names
from cvxq.lean.spec import DecoderSpec


class Weight(Hashable, Protocol):
    """A matrix W (N, K) on its device, packed or not."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x (M, K) · Wᵀ + bias (N,): (M, N) in the type of x."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows ids (M,) int64 of W: (M, K)."""


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
        return sum(weight.nbytes for weight in {*self._multiplied(), self.embedding})

    def bytes_per_token(self) -> int:
        """Bytes of matrices that predicting one token reads: all, but one row of embeddings."""
        return sum(weight.nbytes for weight in self._multiplied())

    def _multiplied(self) -> set[Weight]:
        linears = [self.project_in, self.project_out, self.head]
        for layer in self.layers:
            linears += [layer.qkv, layer.o, layer.up, layer.down]
        return {weight for linear in linears if linear for weight in linear.weights}


def load_weights(
    spec: DecoderSpec,
    found: names.DecoderWeights,
    reader: Reader,
    device: torch.device,
    dtype: torch.dtype,
    keep_packed: bool,
) -> TorchWeights:
    """Bring the weights `found` in the file to `device`; expanded ones take `dtype`."""
    loader = _Loader(spec, reader, device, dtype, keep_packed and device.type == "cuda")
    layers = tuple(loader.layer(layer) for layer in found.layers)
    embedding = loader.weight(found.embedding)
    tied = found.head.weight == found.embedding
    head = Linear((embedding if tied else loader.weight(found.head.weight),), None)
    if found.head.bias is not None:
        head = Linear(head.weights, loader.floats(found.head.bias).to(dtype))
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
    keep_packed: bool

    def floats(self, name: str) -> torch.Tensor:
        """Return a small tensor as float32 on the device."""
        return torch.tensor(names.read_floats(self.reader, name), device=self.device)

    def weight(self, name: str) -> Weight:
        """Return a matrix, packed if it may stay so."""
        value = self.reader.read(name)
        if isinstance(value, RawTensor):
            return DenseWeight(_raw(value).to(self.device, self.dtype))
        packed = self._packed(value)
        if not self.keep_packed:
            return DenseWeight(packed.to(self.device).dense(self.dtype))
        from cvxq_kernels.gpu import GpuWeight

        return GpuWeight.from_packed(packed, self.device)

    def linear(self, *matrices: names.Matrix) -> Linear:
        """Return one linear map of all `matrices`, in order, fused where that is possible."""
        weights = [self.weight(matrix.weight) for matrix in matrices]
        bias = None
        if any(matrix.bias is not None for matrix in matrices):
            parts = [
                torch.zeros(matrix.shape[0], device=self.device)
                if matrix.bias is None
                else self.floats(matrix.bias)
                for matrix in matrices
            ]
            bias = torch.cat(parts).to(self.dtype)
        return Linear(_fused(weights), bias)

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


def _fused(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Join weights of one kind into one."""
    if len(weights) == 1:
        return tuple(weights)
    dense = [weight.values for weight in weights if isinstance(weight, DenseWeight)]
    if len(dense) == len(weights):
        return (DenseWeight(torch.cat(dense)),)
    if dense:  # some kept as they were, some packed
        return tuple(weights)
    from cvxq_kernels.gpu import GpuWeight

    return (GpuWeight.fused(weights),)


def _raw(value: RawTensor) -> torch.Tensor:
    """Copy an unquantized matrix out of the file."""
    data = value.data.copy()
    if value.dtype == "bf16":
        return torch.from_numpy(data.view("int16")).view(torch.bfloat16).reshape(value.shape)
    return torch.from_numpy(data).reshape(value.shape)

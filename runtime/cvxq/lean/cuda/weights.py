"""A decoder's weights on a torch device, brought there one tensor at a time.

Matrices stay packed where the caller can compute with packed ones (`Pack`), else they are expanded
once.  Matrices that share their input are fused: q/k/v and gate/up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from cvxq_format import CompandedTensor
from cvxq_format import decoder_record as described
from cvxq_format.decoder_record import DecoderRecord
from cvxq_kernels import PackedWeight, UnsupportedWeightError
from cvxq_kernels.decode import Norm
from torch.nn import functional

from cvxq.lean.products import LayerProducts, Product, Tensors, Value, find_products
from cvxq.lean.weights import read_floats, read_norm, read_product
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


# Makes one weight (sum of N_i, K) of packed ones; UnsupportedWeightError where none can be.
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
class Block:
    """A feed-forward block; up: gate and up where it is gated."""

    up: Linear
    down: Linear


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer; its norms are named as the record's.

    blocks: one, or with a router one for each expert. sinks: (heads,) float32, or None.
    """

    qkv: Linear
    o: Linear
    blocks: tuple[Block, ...]
    router: Linear | None
    sinks: torch.Tensor | None
    q_norm: Norm | None
    k_norm: Norm | None
    attention_in: Norm | None
    attention_out: Norm | None
    attention_sum: Norm | None
    ffn_in: Norm | None
    ffn_out: Norm | None
    ffn_sum: Norm | None


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

    def bytes_per_token(self, record: DecoderRecord) -> int:
        """Bytes of matrices that predicting one token reads.

        All, but one row of embeddings, and of experts as many as a token goes through.
        """
        shares: dict[Weight, float] = {}
        for told, layer in zip(record.layers, self.layers, strict=True):
            experts = told.feed_forward.experts
            if experts is not None:
                routed = (w for block in layer.blocks for w in _weights(block.up, block.down))
                shares |= dict.fromkeys(routed, experts.chosen / experts.count)
        return round(sum(w.nbytes * shares.get(w, 1) for w in self.multiplied()))

    def multiplied(self) -> list[Weight]:
        """All weights that some input is multiplied by, in a fixed order."""
        linears = [self.project_in, self.project_out, self.head]
        for layer in self.layers:
            linears += [layer.qkv, layer.o, layer.router]
            for block in layer.blocks:
                linears += [block.up, block.down]
        return list(dict.fromkeys(_weights(*linears)))


def _weights(*linears: Linear | None) -> list[Weight]:
    return [weight for linear in linears if linear for weight in linear.weights]


def load_weights(
    record: DecoderRecord,
    tensors: Tensors,
    device: torch.device,
    dtype: torch.dtype,
    pack: Pack | None = None,
) -> TorchWeights:
    """Bring the tensors that `record` names to `device`; expanded matrices take `dtype`."""
    loader = _Loader(record, tensors, device, dtype, pack)
    found = find_products(record, tensors)
    layers = tuple(map(loader.layer, record.layers, found.layers))
    head = loader.linear(found.head)
    (embedding,) = head.weights
    if found.embedding != found.head:
        (embedding,) = loader.linear(found.embedding).weights
    positions = None if found.positions is None else loader.floats(found.positions)
    return TorchWeights(
        embedding=embedding,
        positions=positions,
        project_in=None if found.project_in is None else loader.linear(found.project_in),
        project_out=None if found.project_out is None else loader.linear(found.project_out),
        layers=layers,
        final_norm=loader.norm(record.final_norm, record.hidden),
        head=head,
    )


@dataclass(frozen=True)
class _Loader:
    record: DecoderRecord
    tensors: Tensors
    device: torch.device
    dtype: torch.dtype
    pack: Pack | None

    def floats(self, product: Product) -> torch.Tensor:
        """Return a matrix as float32 on the device."""
        value, _ = read_product(self.tensors, product)
        return self._dense(value, torch.float32)

    def linear(self, *products: Product) -> Linear:
        """Return one linear map of all `products`, in order, which share their input.

        Its matrices are one if all are packed or none is.
        """
        read = [read_product(self.tensors, product) for product in products]
        weights = self._weights([value for value, _ in read])
        if all(bias is None for _, bias in read):
            return Linear(weights, None)
        parts = [
            np.zeros(product.outputs, np.float32) if bias is None else bias
            for product, (_, bias) in zip(products, read, strict=True)
        ]
        return Linear(weights, torch.tensor(np.concatenate(parts)).to(self.device, self.dtype))

    def _weights(self, values: Sequence[Value]) -> tuple[Weight, ...]:
        packed = [self._packed(value) for value in values if isinstance(value, CompandedTensor)]
        if self.pack is not None and len(packed) == len(values):
            with contextlib.suppress(UnsupportedWeightError):
                return (self.pack(packed),)
        if self.pack is not None and packed and len(values) > 1:
            return tuple(weight for value in values for weight in self._weights([value]))
        return (DenseWeight(torch.cat([self._dense(value, self.dtype) for value in values])),)

    def norm(self, norm: described.Norm | None, size: int) -> Norm | None:
        """Return a norm over `size` elements."""
        if norm is None:
            return None
        weight, bias = (
            None if values is None else torch.tensor(values, device=self.device)
            for values in read_norm(self.tensors, norm, size)
        )
        return Norm(norm.kind, weight, bias, norm.epsilon)

    def layer(self, layer: described.Layer, found: LayerProducts) -> Layer:
        """Return one layer."""
        record, attention, hidden = self.record, layer.attention, self.record.hidden
        over_one = attention.norms_over_heads
        queries = record.head_dim * (1 if over_one else record.heads)
        keys = record.head_dim * (1 if over_one else record.kv_heads)
        return Layer(
            qkv=self.linear(*found.qkv),
            o=self.linear(found.o),
            blocks=tuple(
                Block(self.linear(*block.up), self.linear(block.down)) for block in found.blocks
            ),
            router=None if found.router is None else self.linear(found.router),
            sinks=self._sinks(attention.sinks),
            q_norm=self.norm(attention.q_norm, queries),
            k_norm=self.norm(attention.k_norm, keys),
            attention_in=self.norm(layer.attention_in, hidden),
            attention_out=self.norm(layer.attention_out, hidden),
            attention_sum=self.norm(layer.attention_sum, hidden),
            ffn_in=self.norm(layer.ffn_in, hidden),
            ffn_out=self.norm(layer.ffn_out, hidden),
            ffn_sum=self.norm(layer.ffn_sum, hidden),
        )

    def _sinks(self, name: str | None) -> torch.Tensor | None:
        if name is None:
            return None
        values = read_floats(self.tensors, name, (self.record.heads,))
        return torch.tensor(values, device=self.device)

    def _packed(self, value: CompandedTensor) -> PackedWeight:
        return PackedWeight.from_tensor(value, self.tensors.codebook(value.codebook))

    def _dense(self, value: Value, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(value, CompandedTensor):
            return self._packed(value).to(self.device).dense(dtype)
        return raw_to_torch(value).to(self.device, dtype)

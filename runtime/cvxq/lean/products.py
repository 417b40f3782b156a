"""Which matrices a decoder is made of: a record's parts, fused where one matrix holds several.

The sizes that the record states are checked here, so that nothing is allocated, let alone
computed, by sizes that no tensor has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from cvxq_format import Codebook, CompandedTensor, CorruptError, RawTensor
from cvxq_format.decoder_record import (
    FILE_NAME,
    DecoderRecord,
    FeedForward,
    Layer,
    Part,
    Rows,
)

from cvxq.lean.errors import NotLeanError

Value = RawTensor | CompandedTensor

_MOST_PLACES = 1 << 24  # of a text, and tokens of a vocabulary
_MOST_EXPERTS = 1 << 12  # of a layer
_MOST_UNITS = 1 << 20  # of everything else that is counted: the kernels count products in 32 bits


class Tensors(Protocol):
    """What holds a decoder's tensors; an open `cvxq_format.Reader` does."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tensors."""

    def read(self, name: str) -> Value:
        """Return the tensor of this name or alias; raises KeyError if there is none."""

    def codebook(self, index: int) -> Codebook:
        """Return a codebook that a companded tensor names."""


@dataclass(frozen=True)
class Product:
    """A matrix (N, K) whose outputs are one part of the record, or several side by side.

    rows: of each part, which rows of the stored matrix (None: all), and how many outputs.
    """

    weight: str
    bias: str | None
    rows: tuple[tuple[Rows | None, int], ...]
    inputs: int

    @property
    def outputs(self) -> int:
        """N, of all parts together."""
        return sum(count for _, count in self.rows)


@dataclass(frozen=True)
class BlockProducts:
    """The matrices of a feed-forward block; gate and up, in this order, are one each or one."""

    up: tuple[Product, ...]
    down: Product

    def __iter__(self) -> Iterator[Product]:
        """Yield every matrix."""
        yield from (*self.up, self.down)


@dataclass(frozen=True)
class LayerProducts:
    """The matrices of a layer; q, k and v are one each or one together.

    blocks: one, or with a router one for each expert.
    """

    qkv: tuple[Product, ...]
    o: Product
    blocks: tuple[BlockProducts, ...]
    router: Product | None = None

    def __iter__(self) -> Iterator[Product]:
        """Yield every matrix."""
        yield from (*self.qkv, self.o)
        for block in self.blocks:
            yield from block
        if self.router is not None:
            yield self.router


@dataclass(frozen=True)
class DecoderProducts:
    """All matrices of a decoder; a tied embedding is the head's."""

    embedding: Product
    positions: Product | None
    project_in: Product | None
    project_out: Product | None
    layers: tuple[LayerProducts, ...]
    head: Product

    def __iter__(self) -> Iterator[Product]:
        """Yield every matrix, tied ones more than once."""
        whole = (self.embedding, self.head, self.positions, self.project_in, self.project_out)
        yield from (product for product in whole if product is not None)
        for layer in self.layers:
            yield from layer


def find_products(record: DecoderRecord, tensors: Tensors) -> DecoderProducts:
    """Return the matrices of `record`.

    Raises CorruptError for sizes that no decoder has, NotLeanError for what none here does.
    """
    _check_sizes(record)
    hidden, width, r = record.hidden, record.embedding_width, record

    def one(part: Part | None, outputs: int, inputs: int) -> Product | None:
        return next(iter(_products(tensors, inputs, (part, outputs))), None)

    (head,) = _products(tensors, hidden if r.project_out is None else width, (r.head, r.vocabulary))
    (embedding,) = _products(tensors, width, (Part(r.embedding), r.vocabulary))
    positions = None if r.positions is None else Part(r.positions)
    return DecoderProducts(
        embedding=head if replace(head, bias=None) == embedding else embedding,
        positions=one(positions, r.context + r.position_offset, hidden),
        project_in=one(r.project_in, hidden, width),
        project_out=one(r.project_out, width, hidden),
        layers=tuple(_layer(record, layer, tensors) for layer in r.layers),
        head=head,
    )


def _layer(record: DecoderRecord, layer: Layer, tensors: Tensors) -> LayerProducts:
    queries, keys = record.heads * record.head_dim, record.kv_heads * record.head_dim
    attention, experts = layer.attention, layer.feed_forward.experts
    qkv = ((attention.q, queries), (attention.k, keys), (attention.v, keys))
    (o,) = _products(tensors, queries, (attention.o, record.hidden))
    fused = _products(tensors, record.hidden, *qkv)
    if experts is None:
        return LayerProducts(fused, o, (_block(record, layer.feed_forward, tensors),))
    if experts.count > _MOST_EXPERTS:
        raise CorruptError(
            f"{FILE_NAME}: {experts.count} experts, allowed up to {_MOST_EXPERTS}; "
            "the file is corrupt"
        )
    parts = (layer.feed_forward.of_expert(index) for index in range(experts.count))
    blocks = tuple(_block(record, part, tensors) for part in parts)
    if layer.feed_forward.gate is not None and len(blocks[0].up) == 1:
        raise NotLeanError("experts hold gate and up in one matrix")
    (router,) = _products(tensors, record.hidden, (experts.router, experts.count))
    return LayerProducts(fused, o, blocks, router)


def _block(record: DecoderRecord, block: FeedForward, tensors: Tensors) -> BlockProducts:
    up = ((block.gate, record.ffn), (block.up, record.ffn))
    (down,) = _products(tensors, record.ffn, (block.down, record.hidden))
    return BlockProducts(_products(tensors, record.hidden, *up), down)


def _products(
    tensors: Tensors, inputs: int, *places: tuple[Part | None, int]
) -> tuple[Product, ...]:
    """Return what computes parts (those there are, with their outputs) of the same K inputs.

    One product where all are rows of one matrix, else one for each.
    Raises NotLeanError where only some of them share a matrix.
    """
    made = [
        Product(
            tensors.aliases.get(part.weight, part.weight),
            None if part.bias is None else tensors.aliases.get(part.bias, part.bias),
            ((part.rows, count),),
            inputs,
        )
        for part, count in places
        if part is not None
    ]
    if len(made) > 1 and len({(product.weight, product.bias) for product in made}) == 1:
        return (replace(made[0], rows=tuple(rows for product in made for rows in product.rows)),)
    if len({product.weight for product in made}) < len(made):
        raise NotLeanError(f"only some of what reads one input lies in {made[0].weight!r:.100}")
    return tuple(made)


def _check_sizes(record: DecoderRecord) -> None:
    """Raise CorruptError for sizes no decoder can have, NotLeanError for what none here does."""
    units = {
        "hidden": record.hidden,
        "embedding_width": record.embedding_width,
        "heads · head_dim": record.heads * record.head_dim,
        "ffn": record.ffn,
    }
    places = {
        "vocabulary": record.vocabulary,
        "context": record.context,
        "position_offset": record.position_offset,
    }
    for counts, most in ((units, _MOST_UNITS), (places, _MOST_PLACES)):
        for name, count in counts.items():
            if count > most:
                raise CorruptError(
                    f"{FILE_NAME}: {name} is {count}, allowed up to {most}; the file is corrupt"
                )
    if len({rope.switch for rope in record.ropes} - {None}) > 1:
        raise NotLeanError("layers turn long texts in another way from different lengths on")

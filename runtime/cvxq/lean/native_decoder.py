"""A lean decoder on the CPU: a record, executed by the forward pass of `cvxq_kernels.cpu`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from functools import partial
from typing import Any
from weakref import ReferenceType

import numpy as np
import numpy.typing as npt
from cvxq_format import CompandedTensor, RawTensor
from cvxq_format import decoder_record as described
from cvxq_format.decoder_record import DecoderRecord
from cvxq_format.memory import available_memory
from cvxq_kernels import cpu
from cvxq_kernels.cpu.decoder import TEXTS, Decoder, Expert, Layer, Norm, Rope, Shape
from cvxq_kernels.cpu.matrix import Source

from cvxq.cache_size import bytes_per_token
from cvxq.lean.errors import NotLeanError
from cvxq.lean.native_batch import NativeBatch, Reading, read_together
from cvxq.lean.products import (
    BlockProducts,
    DecoderProducts,
    Product,
    Tensors,
    find_products,
)
from cvxq.lean.rope import Turning
from cvxq.lean.weights import read_floats, read_norm, read_product

# Weights repacked together; meanwhile their scales, unpacked, and the file's pages are held.
TOGETHER = 1 << 29
READERS = 2  # threads: checksums take turns with what Python does
CHUNK_TOKENS = 256  # read per call of a prompt; Ctrl-C is felt between two calls

Floats = npt.NDArray[np.float32]


class NativeDecoder:
    """The decoder of a record; see `cvxq.lean.decoder.Decoder`."""

    def __init__(
        self,
        record: DecoderRecord,
        tensors: Tensors,
        threads: int,
        *,
        chunk: int = CHUNK_TOKENS,
        exact: bool = False,
        scratch: int = -1,
        beside: Callable[[], None] | None = None,
    ) -> None:
        """Check and repack the tensors that the record names.

        chunk: tokens per call of a prompt; exact: products in float32 throughout, which is slow
            for single tokens; scratch: descriptor of a file that is to hold the experts, or
            with `exact` all packed matrices, see `Matrix.from_tensor`; beside: called before
            the work that leaves Python to other threads, once or several times.
        Raises NotLeanError without the native library or for what it does not do, CorruptError
        where record and tensors contradict each other.
        """
        if not cpu.is_available():
            raise NotLeanError(f"the native library is missing: {cpu.why_not()}")
        found = find_products(record, tensors)
        self.capacity = record.context
        self.vocabulary = record.vocabulary
        self.end_tokens = frozenset(record.end_tokens)
        self.length = 0
        self.holder: ReferenceType[object] | None = None
        self.layers = len(record.layers)
        self.threads = threads
        self.chunk = min(chunk, record.context)
        self.exact = exact
        self._ropes = record.ropes
        self._turning = Turning(record.ropes)
        self._cache_bytes = bytes_per_token(record)
        outside = set(found) if exact else _routed(found)
        matrices = _load_matrices(found, tensors, threads, scratch, outside, beside)
        parts = _Parts(record, found, tensors, matrices)
        shape = parts.shape(self.chunk)
        layers = [parts.layer(index) for index in range(self.layers)]
        self.native = Decoder(cpu.Pool(threads), shape, layers)
        self.bytes_per_token = parts.bytes_per_token(shape)

    def feed(self, ids: Sequence[int]) -> Floats:
        """Read `ids` (at least one) after the text; return logits (V,) float32 after the last."""
        if len(ids) > 1 or self._turning.crosses(self.length + 1):
            return read_together([self.begin(ids, 1)])[0][0]
        # The usual case, and small models feel every microsecond here.
        self._turning.extend(self.length, ids)
        following = self.native.step(ids[0], self.length, self.exact)
        self.length += 1
        return following

    def begin(self, ids: Sequence[int], wanted: int) -> Reading:
        """Return what is to be read for `ids` after the text: all of it where it turns otherwise.

        wanted: of the last so many the logits are wanted.
        """
        if self._turning.crosses(self.length + len(ids)):
            ids = self._turning.cross(self.length, ids)
            self.native.turn(self._turning.is_long)
            self.length = 0
        self._turning.extend(self.length, ids)
        return Reading(self, np.array(ids, np.int64), wanted)

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read `ids` as a text of its own; return the logits (L, V) float32 after each of them."""
        self.rewind(0)
        return self.rows(ids)

    def rows(self, ids: Sequence[int]) -> Floats:
        """Read `ids` after the text; return the logits (L, V) float32 after each of them."""
        return read_together([self.begin(ids, len(ids))])[0]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def sibling(self) -> NativeDecoder:
        """Return a decoder of the same weights with an empty text of its own."""
        other = copy(self)
        other.length, other.holder = 0, None
        other._turning = Turning(self._ropes)
        other.native = self.native.sibling()
        return other

    def copy(self, other: NativeDecoder, length: int) -> None:
        """Let the text be the first `length` tokens of a sibling's."""
        self.native.copy(other.native, length)
        self._turning = deepcopy(other._turning)
        self.length = length

    def batch(self, texts: int, tokens: int) -> NativeBatch:
        """Return up to `texts` and TEXTS texts, as many of `tokens` as free memory holds twice."""
        free = available_memory()
        fitting = texts if free is None else free // (2 * tokens * self._cache_bytes)
        return NativeBatch(self, max(1, min(texts, fitting, TEXTS)))

    def overhead_seconds(self) -> float:
        """Seconds spent so far in the forward pass outside of matrix products and attention."""
        matrices, attention, total = self.native.clock()
        return total - matrices - attention


def _dense(value: RawTensor) -> npt.NDArray[Any]:
    """Return a raw matrix in its own type, bfloat16 as uint16; other types become float32."""
    if value.dtype in ("bf16", "f16", "f32"):
        return value.data.reshape(value.shape)
    return value.to_float32().reshape(value.shape)


def _routed(found: DecoderProducts) -> set[Product]:
    """The matrices of experts."""
    return {p for y in found.layers if y.router for block in y.blocks for p in block}


def _load_matrices(
    found: DecoderProducts,
    tensors: Tensors,
    threads: int,
    scratch: int,
    outside: set[Product],
    beside: Callable[[], None] | None,
) -> dict[Product, cpu.Matrix]:
    """Check and repack all matrices, some at a time and of these the largest first.

    outside: those that go to the file `scratch`. beside: called when Python has little left to do.
    """
    # Whoever works beside repacking has a processor, too.
    pool = cpu.Pool(max(1, threads - 1) if beside else threads)
    made: dict[Product, cpu.Matrix] = {}
    read = partial(read_product, tensors)
    with ThreadPoolExecutor(READERS) as readers:
        in_turn = readers.map if threads > 1 else map
        for products in _some_at_a_time(dict.fromkeys(found)):
            sources: dict[Product, Source] = {}
            for product, (value, bias) in zip(products, in_turn(read, products), strict=True):
                if isinstance(value, CompandedTensor):
                    place = scratch if product in outside else -1
                    sources[product] = (value, tensors.codebook(value.codebook), bias, place)
                else:
                    made[product] = cpu.Matrix.from_dense(_dense(value), bias, pool)
            if beside:
                beside()
            repacked = cpu.Matrix.from_tensors(list(sources.values()), pool)
            made |= zip(sources, repacked, strict=True)
    return made


def _some_at_a_time(products: Iterable[Product]) -> Iterator[list[Product]]:
    """Cut products into lists of at most TOGETHER weights, each with the largest first."""
    some: list[Product] = []
    total = 0
    for product in products:
        total += _size(product)
        if some and total > TOGETHER:
            yield sorted(some, key=_size, reverse=True)
            some, total = [], _size(product)
        some.append(product)
    yield sorted(some, key=_size, reverse=True)


def _size(product: Product) -> int:
    return product.outputs * product.inputs


class _Parts:
    """Builds the native parts of a record; a matrix that several places share is made once."""

    def __init__(
        self,
        record: DecoderRecord,
        found: DecoderProducts,
        tensors: Tensors,
        matrices: dict[Product, cpu.Matrix],
    ) -> None:
        """Join a record and all its matrices."""
        self._record = record
        self._found = found
        self._tensors = tensors
        self._matrices = matrices

    def _optional(self, product: Product | None) -> cpu.Matrix | None:
        return None if product is None else self._matrices[product]

    def _norm(self, norm: described.Norm | None, size: int) -> Norm:
        if norm is None:
            return Norm()
        return Norm(norm.kind, *read_norm(self._tensors, norm, size), norm.epsilon)

    def layer(self, index: int) -> Layer:
        """Layer `index`."""
        record, layer, found = self._record, self._record.layers[index], self._found.layers[index]
        attention, block, hidden = layer.attention, layer.feed_forward, self._record.hidden
        q, *kv = [self._matrices[product] for product in found.qkv]
        k, v = kv or (None, None)
        is_gated, experts = block.gate is not None, block.experts
        gate, up, down = (None, None, None)
        if experts is None:
            gate, up, down = self._block(found.blocks[0], is_gated)
        widths = [record.head_dim] * 2
        if not attention.norms_over_heads:
            widths = [record.heads * record.head_dim, record.kv_heads * record.head_dim]
        return Layer(
            q=q,
            k=k,
            v=v,
            o=self._matrices[found.o],
            gate=gate,
            up=up,
            down=down,
            scale=attention.scale,
            q_norm=self._norm(attention.q_norm, widths[0]),
            k_norm=self._norm(attention.k_norm, widths[1]),
            attention_in=self._norm(layer.attention_in, hidden),
            attention_out=self._norm(layer.attention_out, hidden),
            attention_sum=self._norm(layer.attention_sum, hidden),
            ffn_in=self._norm(layer.ffn_in, hidden),
            ffn_out=self._norm(layer.ffn_out, hidden),
            ffn_sum=self._norm(layer.ffn_sum, hidden),
            cap=attention.softcap or 0.0,
            window=min(attention.window or 0, record.context),
            rope=attention.rope,
            wide_norms=not attention.norms_over_heads,
            is_parallel=layer.parallel,
            activation=block.activation,
            limit=math.inf if block.limit is None else block.limit,
            slope=block.slope,
            up_offset=block.up_offset,
            sinks=self._sinks(attention.sinks),
            router=self._optional(found.router),
            experts=() if experts is None else self._experts(found.blocks, is_gated),
            chosen=0 if experts is None else experts.chosen,
            shares_of_all=experts is not None and experts.shares == "of_all",
        )

    def _block(
        self, block: BlockProducts, is_gated: bool
    ) -> tuple[cpu.Matrix | None, cpu.Matrix | None, cpu.Matrix]:
        """Gate, up and down of a block; one matrix for both gate and up is its gate."""
        up, down = [self._matrices[p] for p in block.up], self._matrices[block.down]
        return up[0] if is_gated else None, up[-1] if len(up) == 1 + is_gated else None, down

    def _experts(self, blocks: tuple[BlockProducts, ...], is_gated: bool) -> tuple[Expert, ...]:
        made = (self._block(block, is_gated) for block in blocks)
        return tuple(Expert(up, down, gate) for gate, up, down in made if up is not None)

    def _sinks(self, name: str | None) -> Floats | None:
        return None if name is None else read_floats(self._tensors, name, (self._record.heads,))

    def shape(self, chunk: int) -> Shape:
        """All but the layers."""
        record, found = self._record, self._found
        return Shape(
            hidden=record.hidden,
            embedding=record.embedding_width,
            heads=record.heads,
            kv_heads=record.kv_heads,
            head_dim=record.head_dim,
            ffn=record.ffn,
            vocabulary=record.vocabulary,
            capacity=record.context,
            chunk=chunk,
            embed=self._matrices[found.embedding],
            head=self._matrices[found.head],
            final=self._norm(record.final_norm, record.hidden),
            ropes=tuple(_rope(rope) for rope in record.ropes),
            positions=self._optional(found.positions),
            project_in=self._optional(found.project_in),
            project_out=self._optional(found.project_out),
            position_offset=record.position_offset,
            logit_cap=record.logit_softcap or 0.0,
            embedding_scale=record.embedding_scale,
            residual_scale=record.residual_scale,
            logit_scale=record.logit_scale,
        )

    def bytes_per_token(self, shape: Shape) -> int:
        """Bytes of the matrices that predicting one token reads.

        One row of those looked up, and of experts as many as a token goes through.
        """
        parts: dict[int, float] = {id(shape.embed): 1 / shape.vocabulary, id(shape.head): 1}
        if shape.positions is not None:
            parts[id(shape.positions)] = 1 / (shape.capacity + shape.position_offset)
        for layer, found in zip(self._record.layers, self._found.layers, strict=True):
            experts = layer.feed_forward.experts
            if experts is not None:
                share = experts.chosen / experts.count
                products = (product for block in found.blocks for product in block)
                parts |= {id(self._matrices[product]): share for product in products}
        read = (matrix.nbytes * parts.get(id(matrix), 1) for matrix in self._matrices.values())
        return round(sum(read))


def _rope(rope: described.Rope) -> Rope:
    frequencies = np.array(rope.inverse_frequencies, np.float32)
    long = None if rope.switch is None else np.array(rope.long_inverse_frequencies, np.float32)
    return Rope(frequencies, rope.factor, long, rope.long_factor)

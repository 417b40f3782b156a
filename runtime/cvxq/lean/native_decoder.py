"""A lean decoder on the CPU: the forward pass of `cvxq_kernels.cpu` over a file's weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import ReferenceType

import numpy as np
import numpy.typing as npt
from cvxq_format import CompandedTensor, RawTensor, Reader
from cvxq_kernels import cpu
from cvxq_kernels.cpu.decoder import Decoder, Layer, Norm, Shape

from cvxq.lean import weights as names
from cvxq.lean.errors import NotLeanError
from cvxq.lean.spec import DecoderSpec
from cvxq.lean.weights import DecoderWeights, LayerWeights, read_floats

BYTES_PER_THREAD = 4 << 20  # of a file: what a core reads in less time than threads take to meet
CHUNK_TOKENS = 256  # read per call of a prompt; Ctrl-C is felt between two calls

Floats = npt.NDArray[np.float32]


class NativeDecoder:
    """The decoder of `spec`; see `cvxq.lean.decoder.Decoder`."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        reader: Reader,
        threads: int | None = None,
        *,
        chunk: int = CHUNK_TOKENS,
        exact: bool = False,
    ) -> None:
        """Repack the weights of the open file.

        threads: as many as help if None; chunk: tokens per call of a prompt; exact: products in
        float32 throughout, which is slow.  Raises NotLeanError without the native library.
        """
        if not cpu.is_available():
            raise NotLeanError(f"the native library is missing: {cpu.why_not()}")
        self.capacity = spec.context
        self.vocabulary = spec.vocab
        self.length = 0
        self.holder: ReferenceType[object] | None = None
        self.layers = spec.layers
        self.threads = threads or useful_threads(reader.path.stat().st_size)
        self.chunk = min(chunk, spec.context)
        self.exact = exact
        pool = cpu.Pool(self.threads)
        parts = _Parts(spec, weights, reader, self.threads)
        layers = [parts.layer(layer, index) for index, layer in enumerate(weights.layers)]
        shape = parts.shape(weights, self.chunk)
        self._native = Decoder(pool, shape, layers)
        self.bytes_per_token = parts.bytes_per_token(shape)

    def feed(self, ids: Sequence[int]) -> Floats:
        """Read `ids` (at least one) after the text; return logits (V,) float32 after the last."""
        if len(ids) == 1:  # the usual case, and small models feel every microsecond here
            following = self._native.step(ids[0], self.length, self.exact)
            self.length += 1
            return following
        array = np.array(ids, np.int64)
        for start in range(0, len(array), self.chunk):
            piece = array[start : start + self.chunk]
            wanted = int(start + len(piece) == len(array))
            logits = self._native.feed(piece, self.length, wanted, self.exact)
            self.length += len(piece)
        return logits[0]

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read `ids` as a text of its own; return the logits (L, V) float32 after each of them."""
        self.rewind(0)
        array = np.array(ids, np.int64)
        result = np.empty((len(array), self.vocabulary), np.float32)
        for start in range(0, len(array), self.chunk):
            piece = array[start : start + self.chunk]
            result[start : start + len(piece)] = self._native.feed(
                piece, start, len(piece), self.exact
            )
            self.length += len(piece)
        return result

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def overhead_seconds(self) -> float:
        """Seconds spent so far in the forward pass outside of matrix products and attention."""
        products, attention, total = self._native.clock()
        return total - products - attention


def _dense(value: RawTensor) -> npt.NDArray[Any]:
    """Return a raw matrix in its own type, bfloat16 as uint16; other types become float32."""
    if value.dtype in ("bf16", "f16", "f32"):
        return value.data.reshape(value.shape)
    return value.to_float32().reshape(value.shape)


def useful_threads(file_bytes: int) -> int:
    """How many threads decode fastest: a core for every few megabytes of weights, all at most.

    Threads meet a dozen times in a layer, which costs small models more than it gains.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 1 + file_bytes // BYTES_PER_THREAD)


def _places(weights: DecoderWeights) -> Iterator[tuple[str, str | None]]:
    """Yield the names of every matrix and its bias, tied ones more than once."""
    parts = [weights.head, weights.project_in, weights.project_out]
    for layer in weights.layers:
        parts += [layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down]
    yield from ((part.weight, part.bias) for part in parts if part is not None)
    if weights.embedding != weights.head.weight:
        yield weights.embedding, None
    if weights.positions is not None:
        yield weights.positions, None


def _load_matrices(
    weights: DecoderWeights, reader: Reader, threads: int
) -> dict[tuple[str, str | None], cpu.Matrix]:
    """Check and repack all matrices, one per thread at a time, the largest first."""
    places = sorted(dict.fromkeys(_places(weights)), key=lambda place: -reader.entry(place[0]).size)
    with ThreadPoolExecutor(threads) as workers:
        made = workers.map(lambda place: _load_matrix(reader, *place), places)
        return dict(zip(places, made, strict=True))


def _load_matrix(reader: Reader, weight: str, bias: str | None) -> cpu.Matrix:
    value = reader.read(weight)
    added = None if bias is None else read_floats(reader, bias)
    pool = cpu.Pool(1)
    if isinstance(value, CompandedTensor):
        return cpu.Matrix.from_tensor(value, reader.codebook(value.codebook), added, pool)
    return cpu.Matrix.from_dense(_dense(value), added, pool)


class _Parts:
    """Builds native matrices and norms from a file's tensors; tied ones are made once."""

    def __init__(
        self, spec: DecoderSpec, weights: DecoderWeights, reader: Reader, threads: int
    ) -> None:
        self._spec = spec
        self._reader = reader
        self._matrices = _load_matrices(weights, reader, threads)

    def matrix(self, place: names.Matrix | None) -> cpu.Matrix:
        if place is None:
            raise AssertionError("a matrix that this architecture has is missing")
        return self._matrices[place.weight, place.bias]

    def optional(self, place: names.Matrix | None) -> cpu.Matrix | None:
        return None if place is None else self.matrix(place)

    def norm(self, place: names.Norm | None) -> Norm:
        """The norm at `place`, over rows of the stream."""
        return Norm() if place is None else self._norm(place, self._spec.norm)

    def _norm(self, place: names.Norm, kind: str) -> Norm:
        weight = None if place.weight is None else read_floats(self._reader, place.weight)
        if weight is not None and self._spec.norm_offset:
            weight = weight + np.float32(self._spec.norm_offset)
        bias = None if place.bias is None else read_floats(self._reader, place.bias)
        return Norm(kind, weight, bias, self._spec.norm_eps)

    def head_norm(self, place: names.Norm | None) -> Norm:
        """The norm at `place`, over each head."""
        return Norm() if place is None else self._norm(place, "rms")

    def layer(self, layer: LayerWeights, index: int) -> Layer:
        spec = self._spec
        follows_sum = spec.norm_placement == "post"
        attention, ffn = self.norm(layer.after_attention), self.norm(layer.after_ffn)
        return Layer(
            q=self.matrix(layer.q),
            k=self.matrix(layer.k),
            v=self.matrix(layer.v),
            o=self.matrix(layer.o),
            gate=self.optional(layer.gate),
            up=self.matrix(layer.up),
            down=self.matrix(layer.down),
            q_norm=self.head_norm(layer.q_norm),
            k_norm=self.head_norm(layer.k_norm),
            attention_in=self.norm(layer.before_attention),
            attention_out=Norm() if follows_sum else attention,
            attention_sum=attention if follows_sum else Norm(),
            ffn_in=self.norm(layer.before_ffn),
            ffn_out=Norm() if follows_sum else ffn,
            ffn_sum=ffn if follows_sum else Norm(),
            window=spec.windows[index] or 0,
            rotated=spec.rope_layers[index],
        )

    def shape(self, weights: DecoderWeights, chunk: int) -> Shape:
        spec = self._spec
        none = np.empty(0, np.float32)
        head, tied = self.matrix(weights.head), weights.head.weight == weights.embedding
        embed = head if tied else self._matrices[weights.embedding, None]
        positions = self._matrices[weights.positions, None] if weights.positions else None
        return Shape(
            hidden=spec.hidden,
            embedding=spec.embedding_width,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            ffn=spec.ffn,
            vocabulary=spec.vocab,
            capacity=spec.context,
            chunk=chunk,
            activation=spec.activation,
            frequencies=none if spec.rope is None else spec.rope.inverse_frequencies,
            rotary_scale=1.0 if spec.rope is None else spec.rope.attention_factor,
            embed=embed,
            head=head,
            final=self.norm(weights.final_norm),
            positions=positions,
            project_in=self.optional(weights.project_in),
            project_out=self.optional(weights.project_out),
            position_offset=spec.position_offset or 0,
            attention_scale=spec.attention_scale,
            attention_cap=spec.attention_softcap or 0.0,
            logit_cap=spec.logit_softcap or 0.0,
            embedding_scale=spec.embedding_scale,
            residual_scale=spec.residual_scale,
            logit_scale=spec.logit_scale,
        )

    def bytes_per_token(self, shape: Shape) -> int:
        """Bytes of the matrices that predicting one token reads: one row of those looked up."""
        rows = {id(shape.embed): shape.vocabulary, id(shape.head): 1}
        if shape.positions is not None:
            rows[id(shape.positions)] = shape.capacity + shape.position_offset
        return sum(matrix.nbytes // rows.get(id(matrix), 1) for matrix in self._matrices.values())

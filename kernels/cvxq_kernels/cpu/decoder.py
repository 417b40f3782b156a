"""The native forward pass (`native/decoder.h`) as a Python object.

The dataclasses say what a decoder is made of; `Decoder` hands it to the library.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cvxq_kernels.cpu.decoder_structs import (
    FACTORS,
    FLOATS,
    LAYER_MATRICES,
    LAYER_NORMS,
    SHAPE_MATRICES,
    SIZES,
    ExpertStruct,
    LayerStruct,
    NormStruct,
    PieceStruct,
    RopeStruct,
    ShapeStruct,
    declared,
)
from cvxq_kernels.cpu.loader import native
from cvxq_kernels.cpu.matrix import Matrix, Pool

Floats = npt.NDArray[np.float32]

TEXTS = 16  # most that are read together
NORMS = {"none": 0, "rms": 1, "layer": 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over rows: kind "none", "rms" or "layer"; weight and bias (n,) float32, or None."""

    kind: str = "none"
    weight: Floats | None = None
    bias: Floats | None = None
    epsilon: float = 0.0


@dataclass(frozen=True, eq=False)
class Rope:
    """Angles of the pairs of elements that are rotated; long texts have their own.

    frequencies: (pairs,) float32, radians per position; scale: on cosines and sines.
    """

    frequencies: Floats
    scale: float = 1.0
    long_frequencies: Floats | None = None
    long_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Expert:
    """One of the blocks that tokens are routed to; without a gate, down(act(up(x)))."""

    up: Matrix
    down: Matrix
    gate: Matrix | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's matrices and norms.

    k and v None: q gives queries, keys and values side by side.  gate None: down(act(up(x))), else
    down(act(gate(x)) · up(x)); up None: gate gives both.  `*_in` norms make the input of a branch,
    `*_out` ones follow it, `*_sum` ones follow its sum with the stream; q_norm and k_norm, before
    rotation, are over each head, or all at once with wide_norms.  scale, cap: of scores, 0 for no
    cap.  window: keys that a query sees, 0 all of them.  rope: index of one, None for none.
    experts: in place of gate, up and down, with a router that has an output for each; a token goes
    through the `chosen` ones it scores highest.  limit, slope, up_offset: of gated blocks, see
    `cvxq_decoder_math`.  sinks: (heads,) float32, scores without a value, or None.
    """

    q: Matrix
    k: Matrix | None
    v: Matrix | None
    o: Matrix
    gate: Matrix | None
    up: Matrix | None
    down: Matrix | None
    scale: float
    q_norm: Norm = Norm()
    k_norm: Norm = Norm()
    attention_in: Norm = Norm()
    attention_out: Norm = Norm()
    attention_sum: Norm = Norm()
    ffn_in: Norm = Norm()
    ffn_out: Norm = Norm()
    ffn_sum: Norm = Norm()
    cap: float = 0.0
    window: int = 0
    rope: int | None = None
    wide_norms: bool = False
    is_parallel: bool = False
    activation: str = "silu"
    limit: float = math.inf
    slope: float = 1.0
    up_offset: float = 0.0
    sinks: Floats | None = None
    router: Matrix | None = None
    experts: tuple[Expert, ...] = ()
    chosen: int = 0
    shares_of_all: bool = False


@dataclass(frozen=True, eq=False)
class Shape:
    """Sizes and constants of a decoder, and what does not belong to a layer; see `decoder.h`.

    capacity: most tokens of a text; chunk: most tokens of a call; logit_cap: 0 for none.
    """

    hidden: int
    embedding: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    capacity: int
    chunk: int
    embed: Matrix
    head: Matrix
    final: Norm
    ropes: tuple[Rope, ...] = ()
    positions: Matrix | None = None
    project_in: Matrix | None = None
    project_out: Matrix | None = None
    position_offset: int = 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0


# A quarter of the time that `array.ctypes.data` takes.
_first_byte: Any = ctypes.c_char.from_buffer
_address = ctypes.addressof


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens ids (n,) int64 at positions from `start` on, whose predecessors `decoder` has read.

    wanted: of the last so many the logits after them are wanted.
    """

    decoder: Decoder
    ids: npt.NDArray[np.int64]
    start: int
    wanted: int


class Decoder:
    """Keys and values of one text, and the forward pass over it."""

    def __init__(self, pool: Pool, shape: Shape, layers: Sequence[Layer]) -> None:
        """Reserve scratch for `shape.chunk` tokens; raises MemoryError when there is none."""
        self.shape = shape
        self._pool, self._layers = pool, tuple(layers)
        self._kept: list[object] = []  # what the library keeps pointers to, beside these
        self._library = declared(native())
        described = (LayerStruct * len(layers))(*(self._layer(layer) for layer in layers))
        handle = self._library.cvxq_decoder_new(
            pool.handle, ctypes.byref(self._shape(shape, len(layers))), described
        )
        if not handle:
            raise MemoryError("no memory for the decoder's scratch; free some")
        self._handle = ctypes.c_void_p(handle)
        self._feed = self._library.cvxq_decoder_feed
        self._token = ctypes.c_int64()
        self._piece = PieceStruct(handle)
        self._piece_address = ctypes.c_void_p(ctypes.addressof(self._piece))
        self._token_address = ctypes.c_void_p(ctypes.addressof(self._token))
        # The pool must live longer; `_kept` belongs to self, which is gone by then.
        weakref.finalize(self, _free, self._library, handle, pool)

    def sibling(self) -> Decoder:
        """Return a decoder of the same matrices and pool, with a text of its own."""
        return Decoder(self._pool, self.shape, self._layers)

    def feed(
        self, ids: npt.NDArray[np.int64], start: int, wanted: int, exact: bool = False
    ) -> Floats:
        """Read up to `shape.chunk` tokens (n,) at positions from `start` on.

        The tokens before `start` must have been read.  Returns the logits (wanted, V) after the
        last `wanted` of them; exact: from float32 products throughout.  Raises ValueError for
        tokens or positions out of their range.
        """
        return self.feed_together([Piece(self, ids, start, wanted)], exact)

    def feed_together(self, pieces: Sequence[Piece], exact: bool = False) -> Floats:
        """Read pieces of one to TEXTS texts, up to `shape.chunk` tokens together.

        Their decoders are different siblings, or this one.  Returns the logits of one piece after
        the other, (all that are wanted, V); the rest as `feed` does.
        """
        wanted, count = sum(p.wanted for p in pieces), sum(len(p.ids) for p in pieces)
        logits = np.empty((wanted, self.shape.vocabulary), np.float32)
        ids = pieces[0].ids if len(pieces) == 1 else np.concatenate([p.ids for p in pieces])
        told = (PieceStruct * len(pieces))(
            *(PieceStruct(p.decoder._handle, p.start, len(p.ids), p.wanted) for p in pieces)
        )
        status = self._feed(
            *(self._handle, ids.ctypes.data, ctypes.byref(told), len(pieces)),
            *(exact, logits.ctypes.data),
        )
        self._check(status, count, max(piece.start for piece in pieces))
        return logits

    def step(self, token: int, start: int, exact: bool = False) -> Floats:
        """Read one token as `feed` does; return the logits (V,) after it."""
        logits = np.empty(self.shape.vocabulary, np.float32)
        self._token.value = token
        piece = self._piece
        piece.start, piece.count, piece.wanted = start, 1, 1
        place = _address(_first_byte(logits))
        status = self._feed(self._handle, self._token_address, self._piece_address, 1, exact, place)
        if status:
            self._check(status, 1, start)
        return logits

    def _check(self, status: int, count: int, start: int) -> None:
        if status == 1:
            raise MemoryError("no memory for more keys and values; use a shorter context")
        if status:
            raise ValueError(
                f"{count} tokens at position {start}: allowed are tokens 0 to "
                f"{self.shape.vocabulary - 1}, up to {self.shape.chunk} at once, and positions "
                f"below {self.shape.capacity}"
            )

    def copy(self, other: Decoder, count: int) -> None:
        """Hold the first `count` tokens that `other`, a sibling, has read."""
        status = self._library.cvxq_decoder_copy(self._handle, other._handle, count)
        if status == 1:
            raise MemoryError("no memory for more keys and values; use a shorter context")
        if status:
            raise ValueError(f"{count} tokens are to be copied, of which the other holds fewer")

    def turn(self, is_long: bool) -> None:
        """Turn texts read from now on, from their start, as long ones or as short ones."""
        self._library.cvxq_decoder_turn(self._handle, is_long)

    def clock(self) -> tuple[float, float, float]:
        """Seconds spent so far with matrices, in attention, and altogether."""
        products, attention, total = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int64()
        self._library.cvxq_decoder_clock(
            self._handle, ctypes.byref(products), ctypes.byref(attention), ctypes.byref(total)
        )
        return products.value / 1e9, attention.value / 1e9, total.value / 1e9

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scratch held now."""
        size: int = self._library.cvxq_decoder_bytes(self._handle)
        return size

    def _layer(self, layer: Layer) -> LayerStruct:
        return LayerStruct(
            *(_handle(getattr(layer, name)) for name in LAYER_MATRICES),
            *(self._norm(getattr(layer, name)) for name in LAYER_NORMS),
            layer.scale,
            layer.cap,
            layer.window,
            -1 if layer.rope is None else layer.rope,
            layer.wide_norms,
            layer.is_parallel,
            ACTIVATIONS[layer.activation],
            layer.limit,
            layer.slope,
            layer.up_offset,
            self._floats(layer.sinks),
            _handle(layer.router),
            self._experts(layer.experts),
            len(layer.experts),
            layer.chosen,
            layer.shares_of_all,
        )

    def _experts(self, experts: tuple[Expert, ...]) -> Any:
        if not experts:
            return None
        made = (ExpertStruct(_handle(e.gate), _handle(e.up), _handle(e.down)) for e in experts)
        array = (ExpertStruct * len(experts))(*made)
        self._kept.append(array)
        return array

    def _shape(self, shape: Shape, layers: int) -> ShapeStruct:
        return ShapeStruct(
            layers,
            *(getattr(shape, name) for name in SIZES),
            shape.capacity,
            shape.chunk,
            len(shape.ropes),
            shape.position_offset,
            *(getattr(shape, name) for name in FACTORS),
            (RopeStruct * len(shape.ropes))(*(self._rope(rope) for rope in shape.ropes)),
            *(_handle(getattr(shape, name)) for name in SHAPE_MATRICES),
            self._norm(shape.final),
        )

    def _rope(self, rope: Rope) -> RopeStruct:
        long = rope.frequencies if rope.long_frequencies is None else rope.long_frequencies
        return RopeStruct(
            self._floats(rope.frequencies),
            self._floats(long),
            rope.scale,
            rope.scale if rope.long_frequencies is None else rope.long_scale,
            len(rope.frequencies),
        )

    def _norm(self, norm: Norm) -> NormStruct:
        weight, bias = self._floats(norm.weight), self._floats(norm.bias)
        return NormStruct(weight, bias, NORMS[norm.kind], norm.epsilon)

    def _floats(self, values: Floats | None) -> ctypes._Pointer[ctypes.c_float] | None:
        if values is None:
            return None
        values = np.ascontiguousarray(values, np.float32)
        self._kept.append(values)
        return values.ctypes.data_as(FLOATS)


def _free(library: ctypes.CDLL, handle: int, pool: Pool) -> None:
    """Free the native decoder; `pool` is named so that it lives until then."""
    library.cvxq_decoder_free(handle)


def _handle(matrix: Matrix | None) -> ctypes.c_void_p | None:
    return None if matrix is None else matrix.handle

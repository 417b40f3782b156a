"""`decoder.json`: what a decoder has to compute, with every number resolved.

A converter writes it while the library that defines the model is loaded, so that a runtime needs
to know no library's defaults. One record describes one decoder-only transformer:

    x = embedding[ids] · embedding_scale        (then project_in; + positions[place + offset])
    per layer, with a = attention, f = feed_forward, r = residual_scale:
        y = a(attention_in(x))
        x = attention_sum(x + r · attention_out(y))
        y = f(ffn_in(x))                         (parallel: of the layer's own input x)
        x = ffn_sum(x + r · ffn_out(y))
    logits = softcap(head(project_out(final_norm(x))) · logit_scale)

A norm that is null leaves its input as it is. softcap(y) = c · tanh(y / c). A feed-forward block is
down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate. Attention norms queries and keys,
turns them, scales the scores by `scale`, soft-caps them, and masks: a query at place i sees keys
j ≤ i with i − j < window. Pairs (d, d + R/2) of the first R dimensions of a head are turned by
place · inverse_frequencies[d], cosine and sine multiplied by `factor`.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from cvxq_format.errors import CorruptError, UnsupportedError

FILE_NAME = "decoder.json"
VERSION = 1
_MOST_ITEMS = 1 << 16  # of a list: layers, frequencies, tokens

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix that holds several: first + step · i + (0 … run − 1), i = 0, 1, …

    As many as the use of the part says. Concatenated parts have one run; heads that take turns
    have a run each.
    """

    first: int
    run: int
    step: int


@dataclass(frozen=True)
class Part:
    """A product with a matrix: names of its weight and its bias, and which rows it takes."""

    weight: str
    bias: str | None = None
    rows: Rows | None = None


@dataclass(frozen=True)
class Norm:
    """x / √(mean x² + epsilon) · (weight + offset) ("rms"), or of x − mean x, + bias ("layer")."""

    kind: Literal["rms", "layer"]
    epsilon: float
    weight: str | None = None
    bias: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Rope:
    """Angles per place of the R/2 pairs of dimensions that are turned.

    switch: None, or the longest text whose keys and queries are turned so; those of a longer one
    are all turned by `long_inverse_frequencies` and `long_factor` instead.
    """

    inverse_frequencies: tuple[float, ...]
    factor: float = 1.0
    switch: int | None = None
    long_inverse_frequencies: tuple[float, ...] = ()
    long_factor: float = 1.0


@dataclass(frozen=True)
class Attention:
    """q: heads · head_dim rows; k, v: kv_heads · head_dim; o takes heads · head_dim inputs.

    q_norm, k_norm: over each head, or, if norms_over_heads is false, over all of them at once.
    window: None for all keys. rope: index of one of the record's, None for none.
    """

    q: Part
    k: Part
    v: Part
    o: Part
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norms_over_heads: bool = True
    softcap: float | None = None
    window: int | None = None
    rope: int | None = None


@dataclass(frozen=True)
class FeedForward:
    """gate and up: ffn rows; down takes ffn inputs."""

    up: Part
    down: Part
    activation: Activation
    gate: Part | None = None


@dataclass(frozen=True)
class Layer:
    """Two branches and the norms around them; `parallel`: both branches read the layer's input."""

    attention: Attention
    feed_forward: FeedForward
    parallel: bool = False
    attention_in: Norm | None = None
    attention_out: Norm | None = None
    attention_sum: Norm | None = None
    ffn_in: Norm | None = None
    ffn_out: Norm | None = None
    ffn_sum: Norm | None = None


@dataclass(frozen=True)
class DecoderRecord:
    """Everything mathematical of one decoder-only transformer; names are of the file's tensors.

    context: the most places. embedding_width: columns of the embedding, hidden unless projected.
    position_offset: rows of the position table before place 0. end_tokens: that end a text.
    """

    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    embedding_width: int
    embedding: str
    head: Part
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...] = ()
    final_norm: Norm | None = None
    positions: str | None = None
    position_offset: int = 0
    project_in: Part | None = None
    project_out: Part | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    end_tokens: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the document; fields that have their default are left out."""
        return {"version": VERSION, **_written(self)}


def read_record(document: Any) -> DecoderRecord:
    """Return the record of a parsed `decoder.json`.

    Raises UnsupportedError for another version, and CorruptError, naming the place, for whatever
    is missing, unknown, of another type or not finite.
    """
    if not isinstance(document, Mapping):
        raise CorruptError(f"{FILE_NAME} is no object; the file is corrupt")
    version = document.get("version")
    if version != VERSION:
        raise UnsupportedError(
            f"{FILE_NAME} has version {version!r}, this reader knows {VERSION}; update cvxq"
        )
    values = {key: value for key, value in document.items() if key != "version"}
    record: DecoderRecord = _read(FILE_NAME, DecoderRecord, values)
    _check(record)
    return record


def _check(record: DecoderRecord) -> None:
    """Raise CorruptError if sizes contradict each other."""
    if record.kv_heads < 1 or record.heads % record.kv_heads or not record.layers:
        raise CorruptError(f"{FILE_NAME}: heads do not divide by kv_heads, or there is no layer")
    for rope in record.ropes:
        for table in (rope.inverse_frequencies, rope.long_inverse_frequencies):
            if 2 * len(table) > record.head_dim:
                raise CorruptError(f"{FILE_NAME}: {len(table)} frequencies in a head")
    for layer in record.layers:
        index = layer.attention.rope
        if index is not None and not 0 <= index < len(record.ropes):
            raise CorruptError(f"{FILE_NAME}: rope {index}, there are {len(record.ropes)}")


def _written(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        given = {f.name: (getattr(value, f.name), f.default) for f in fields(value)}
        return {name: _written(v) for name, (v, default) in given.items() if v != default}
    if isinstance(value, tuple):
        return [_written(item) for item in value]
    return value


def _read(where: str, kind: Any, value: Any) -> Any:
    """Return `value` as `kind`: a dataclass, a tuple of one kind, a literal, a number, a text."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _read(where, next(a for a in arguments if a is not type(None)), value)
    if origin is tuple:
        if not isinstance(value, list) or len(value) > _MOST_ITEMS:
            raise _wrong(where, value, f"a list of at most {_MOST_ITEMS}")
        return tuple(_read(f"{where}[{i}]", arguments[0], v) for i, v in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, value, " or ".join(arguments))
        return value
    if is_dataclass(kind):
        return _read_fields(where, kind, value)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind and not (kind is int and value < 0):
        return value
    raise _wrong(where, value, {float: "a finite number", int: "a whole number"}.get(kind, "text"))


def _read_fields(where: str, kind: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "an object")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise CorruptError(f"{where} has unknown key {unknown[0][:80]!r}; the file is corrupt")
    read = {name: _read(f"{where}.{name}", hints[name], item) for name, item in value.items()}
    try:
        return kind(**read)
    except TypeError:
        missing = next(n for n in hints if n not in read and not hasattr(kind, n))
        raise CorruptError(f"{where} lacks key {missing!r}; the file is corrupt") from None


def _wrong(where: str, value: Any, allowed: str) -> CorruptError:
    return CorruptError(f"{where}: {value!r:.60}, allowed {allowed}; the file is corrupt")

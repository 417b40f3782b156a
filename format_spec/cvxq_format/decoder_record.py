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

Version 2 adds mixtures of experts and what comes with them: `Experts`, bounds of a gated block and
sinks of attention. A record without them is written as version 1.
"""

from __future__ import annotations

import functools
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from cvxq_format.errors import CorruptError, UnsupportedError
from cvxq_format.json_strict import parse

FILE_NAME = "decoder.json"
VERSION = 2  # the newest; a record has the oldest that holds what it says
ANY_EXPERT = "*"  # stands for the expert's number in names
MAX_RECORD_SIZE = 16 << 20
_MOST_ITEMS = 1 << 16  # of a list: layers, frequencies, tokens
_LARGEST = 2**63 - 1
_ALLOWED = {
    float: "a finite number",
    int: f"a whole number from 0 to {_LARGEST}",
    bool: "true or false",
    str: "a string",
}
_SIZES = (
    *("vocabulary", "hidden", "heads", "kv_heads", "head_dim", "ffn", "context"),
    "embedding_width",
)

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
    window: None for all keys. rope: index of one of the record's, None for none. sinks: tensor of a
    score for each head, of a key without a value that every query sees.
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
    sinks: str | None = None


@dataclass(frozen=True)
class Experts:
    """A choice among `count` blocks alike: the `chosen` ones whose router(x), count rows, is most.

    Their outputs are added, each times its share: the softmax of the scores, of those that were
    chosen, or of all. Parts of the block name tensors with `ANY_EXPERT` for 0 … count − 1.
    """

    count: int
    chosen: int
    router: Part
    shares: Literal["of_chosen", "of_all"]


@dataclass(frozen=True)
class FeedForward:
    """gate and up: ffn rows; down takes ffn inputs.

    limit: gates are at most that, and what they gate at most that far from 0. slope: silu is
    z / (1 + e^(−slope · z)). up_offset: added to what is gated. experts: None for a single block.
    """

    up: Part
    down: Part
    activation: Activation
    gate: Part | None = None
    limit: float | None = None
    slope: float = 1.0
    up_offset: float = 0.0
    experts: Experts | None = None

    def of_expert(self, index: int) -> FeedForward:
        """The block of one expert."""
        gate = None if self.gate is None else _of_expert(self.gate, index)
        up, down = _of_expert(self.up, index), _of_expert(self.down, index)
        return replace(self, up=up, down=down, gate=gate, experts=None)


_VERSION_2: dict[type, tuple[str, ...]] = {
    Attention: ("sinks",),
    FeedForward: ("limit", "slope", "up_offset", "experts"),
}


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
        return {"version": 2 if _adds_of_version_2(self) else 1, **_written(self)}


def parse_record(data: bytes) -> DecoderRecord:
    """Return the record of a carried `decoder.json`; raises what `read_record` does."""
    if len(data) > MAX_RECORD_SIZE:
        raise CorruptError(f"{FILE_NAME} has {len(data)} bytes, allowed {MAX_RECORD_SIZE}")
    return read_record(parse(data, FILE_NAME, fractions=True))


def read_record(document: Any) -> DecoderRecord:
    """Return the record of a parsed `decoder.json`.

    Raises UnsupportedError for another version, and CorruptError, naming the place, for whatever
    is missing, unknown, of another type or not finite.
    """
    if not isinstance(document, Mapping):
        raise CorruptError(f"{FILE_NAME} is no object; the file is corrupt")
    if "version" not in document:
        raise _lacks(FILE_NAME, "version")
    version = _read(f"{FILE_NAME}.version", int, document["version"])
    if not 1 <= version <= VERSION:
        raise UnsupportedError(
            f"{FILE_NAME} has version {version}, this reader knows 1 to {VERSION}; update cvxq"
        )
    values = {key: value for key, value in document.items() if key != "version"}
    record: DecoderRecord = _read(FILE_NAME, DecoderRecord, values)
    _check(record)
    for place in _adds_of_version_2(record) if version == 1 else ():
        raise CorruptError(f"{place} is of version 2, the document of 1; the file is corrupt")
    return record


def _adds_of_version_2(record: DecoderRecord) -> list[str]:
    """The places of what version 1 lacks."""
    found = []
    for where, part in _inside(FILE_NAME, record):
        added = _VERSION_2.get(type(part), ())
        found += [
            f"{where}.{name}" for name in added if getattr(part, name) != _default(part, name)
        ]
    return found


def _default(part: Any, name: str) -> Any:
    return next(field.default for field in fields(part) if field.name == name)


def _of_expert(part: Part, index: int) -> Part:
    bias = None if part.bias is None else part.bias.replace(ANY_EXPERT, str(index))
    return replace(part, weight=part.weight.replace(ANY_EXPERT, str(index)), bias=bias)


def _check(record: DecoderRecord) -> None:
    """Raise CorruptError if a value means nothing, or two contradict each other."""
    for where, part in _inside(FILE_NAME, record):
        for key, holds, allowed in _rules(record, part):
            if not holds:
                raise _wrong(f"{where}.{key}", getattr(part, key), allowed)


def _rules(record: DecoderRecord, part: Any) -> Iterator[tuple[str, bool, str]]:
    """Yield (field, whether it is as it must be, what is allowed) of one record inside."""

    def least(key: str, lowest: int) -> tuple[str, bool, str]:
        value = getattr(part, key)
        return key, value is None or value >= lowest, f"{lowest} or more"

    def above_0(key: str) -> tuple[str, bool, str]:
        value = getattr(part, key)
        return key, value is None or value > 0, "more than 0"

    if isinstance(part, DecoderRecord):
        yield from (least(key, 1) for key in _SIZES)
        yield above_0("logit_softcap")
        divides = part.heads % part.kv_heads == 0
        yield "kv_heads", divides, f"a divisor of {part.heads} heads"
        fits = part.embedding_width == part.hidden or part.project_in is not None
        yield "embedding_width", fits, f"{part.hidden} without project_in"
        yield "layers", len(part.layers) > 0, "one layer or more"
    elif isinstance(part, Attention):
        yield above_0("softcap")
        yield least("window", 1)
        known = part.rope is None or part.rope < len(record.ropes)
        yield "rope", known, f"an index of {len(record.ropes)} ropes"
    elif isinstance(part, Experts):
        yield least("count", 1)
        yield "chosen", 1 <= part.chosen <= part.count, f"1 to {part.count}"
    elif isinstance(part, FeedForward):
        yield above_0("limit")
        yield above_0("slope")
        gated, swish = part.gate is not None, part.activation == "silu"
        yield "limit", part.limit is None or gated, "none without a gate"
        yield "up_offset", part.up_offset == 0 or gated, "0 without a gate"
        yield "slope", part.slope == 1 or swish, "1 but for silu"
    elif isinstance(part, Norm):
        yield least("epsilon", 0)
        yield "bias", part.bias is None or part.kind == "layer", "in a norm of kind 'layer'"
    elif isinstance(part, Rows):
        yield least("run", 1)
        yield "step", part.step >= part.run, f"{part.run} or more"
    elif isinstance(part, Rope):
        pairs, most = len(part.inverse_frequencies), record.head_dim // 2
        yield "inverse_frequencies", 1 <= pairs <= most, f"1 to {most} items"
        wanted = 0 if part.switch is None else pairs
        agrees = len(part.long_inverse_frequencies) == wanted
        yield "long_inverse_frequencies", agrees, f"{wanted} items"


def _inside(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every record in `value`, with its place."""
    if is_dataclass(value):
        yield where, value
        for field in fields(value):
            yield from _inside(f"{where}.{field.name}", getattr(value, field.name))
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        for i, item in enumerate(value):
            yield from _inside(f"{where}[{i}]", item)


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
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is int and type(value) is int and 0 <= value <= _LARGEST:
        return value
    if kind in (bool, str) and type(value) is kind:
        return value
    raise _wrong(where, value, _ALLOWED[kind])


def _read_fields(where: str, kind: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "an object")
    hints, needed = _kinds(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise CorruptError(f"{where} has unknown key {unknown[0][:80]!r}; the file is corrupt")
    for name in needed:
        if name not in value:
            raise _lacks(where, name)
    return kind(**{n: _read(f"{where}.{n}", hints[n], item) for n, item in value.items()})


@functools.cache
def _kinds(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the kind of each field of a dataclass, and the fields without a default."""
    return typing.get_type_hints(kind), [f.name for f in fields(kind) if f.default is MISSING]


def _lacks(where: str, key: str) -> CorruptError:
    return CorruptError(f"{where} lacks key {key!r}; the file is corrupt")


def _wrong(where: str, value: Any, allowed: str) -> CorruptError:
    return CorruptError(f"{where}: {value!r:.60}, allowed {allowed}; the file is corrupt")

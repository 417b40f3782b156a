"""`decoder.json`: records come back as they were, and wrong ones are refused by their place."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from cvxq_format import CorruptError, UnsupportedError
from cvxq_format.decoder_record import (
    MAX_RECORD_SIZE,
    Activation,
    Attention,
    DecoderRecord,
    Experts,
    FeedForward,
    Layer,
    Norm,
    Part,
    Rope,
    Rows,
    parse_record,
    read_record,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = st.integers(1, 2**63 - 1)
FACTORS = st.floats(allow_nan=False, allow_infinity=False)
CAPS = st.none() | st.floats(0, exclude_min=True, allow_infinity=False)
SLOPES = st.floats(0, exclude_min=True, allow_infinity=False)
NAMES = st.text("abc*.é", max_size=8)
ROWS = st.tuples(st.integers(0, 99), st.integers(1, 99), st.integers(0, 99)).map(
    lambda drawn: Rows(drawn[0], drawn[1], drawn[1] + drawn[2])
)
PARTS = st.builds(Part, NAMES, st.none() | NAMES, st.none() | ROWS)
EPSILONS = st.floats(0, allow_infinity=False)
NORMS = st.none() | st.one_of(
    st.builds(Norm, st.just("layer"), EPSILONS, st.none() | NAMES, st.none() | NAMES, FACTORS),
    st.builds(Norm, st.just("rms"), EPSILONS, st.none() | NAMES, st.none(), FACTORS),
)
EXPERTS = st.none() | st.builds(
    lambda count, less, router, shares: Experts(count + less, count, router, shares),
    *(st.integers(1, 99), st.integers(0, 99), PARTS, st.sampled_from(["of_chosen", "of_all"])),
)


@st.composite
def ropes(draw: st.DrawFn, head_dim: int) -> Rope:
    pairs = draw(st.integers(1, head_dim // 2))
    tables = st.lists(FACTORS, min_size=pairs, max_size=pairs).map(tuple)
    if draw(st.booleans()):
        return Rope(draw(tables), draw(FACTORS))
    return Rope(draw(tables), draw(FACTORS), draw(SIZES), draw(tables), draw(FACTORS))


@st.composite
def records(draw: st.DrawFn) -> DecoderRecord:
    head_dim, kv_heads = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    found = tuple(draw(st.lists(ropes(head_dim), max_size=3)))
    attentions = st.builds(
        Attention,
        *[PARTS] * 4,
        scale=FACTORS,
        q_norm=NORMS,
        k_norm=NORMS,
        norms_over_heads=st.booleans(),
        softcap=CAPS,
        window=st.none() | SIZES,
        rope=st.none() | st.integers(0, len(found) - 1) if found else st.none(),
        sinks=st.none() | NAMES,
    )
    kinds = st.sampled_from(typing.get_args(Activation))
    plain = st.builds(FeedForward, PARTS, PARTS, kinds, st.none() | PARTS)
    bounded = st.builds(
        FeedForward, PARTS, PARTS, st.just("silu"), PARTS, CAPS, SLOPES, FACTORS, EXPERTS
    )
    feed_forwards = plain | bounded
    layers = st.builds(Layer, attentions, feed_forwards, st.booleans(), *[NORMS] * 6)
    hidden, width = draw(SIZES), draw(SIZES)
    return DecoderRecord(
        vocabulary=draw(SIZES),
        hidden=hidden,
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=draw(SIZES),
        context=draw(SIZES),
        embedding_width=width,
        embedding=draw(NAMES),
        head=draw(PARTS),
        layers=tuple(draw(st.lists(layers, min_size=1, max_size=2))),
        ropes=found,
        final_norm=draw(NORMS),
        positions=draw(st.none() | NAMES),
        position_offset=draw(st.integers(0, 9)),
        project_in=draw(PARTS if width != hidden else st.none() | PARTS),
        project_out=draw(st.none() | PARTS),
        embedding_scale=draw(FACTORS),
        residual_scale=draw(FACTORS),
        logit_scale=draw(FACTORS),
        logit_softcap=draw(CAPS),
        end_tokens=tuple(draw(st.lists(st.integers(0, 99), max_size=3))),
    )


@settings(max_examples=60, deadline=None)
@given(records())
def test_a_record_comes_back_as_it_was(record: DecoderRecord) -> None:
    assert parse_record(json.dumps(record.to_json(), ensure_ascii=True).encode()) == record


@settings(max_examples=60, deadline=None)
@given(records())
def test_a_document_comes_back_as_it_was(record: DecoderRecord) -> None:
    document = record.to_json()
    assert document["version"] == 1 + any(key in json.dumps(document) for key in OF_VERSION_2)
    assert read_record(document).to_json() == document


OF_VERSION_2 = ('"sinks"', '"limit"', '"slope"', '"up_offset"', '"experts"')


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attention.sinks", "s"),
        ("feed_forward.limit", 7),
        ("feed_forward.slope", 1.7),
        ("feed_forward.up_offset", 1),
        ("feed_forward.experts", {"count": 4, "chosen": 2, "router": {"weight": "r"}}),
    ],
)
def test_what_version_2_added_is_not_of_version_1(
    document: dict[str, Any], path: str, value: Any
) -> None:
    holder, key = at(document["layers"][1], path)
    if key == "experts":
        value = {**value, "shares": "of_all"}
    holder[key] = value
    document["layers"][1]["feed_forward"] |= {"activation": "silu", "gate": {"weight": "g"}}
    with pytest.raises(CorruptError, match=rf"layers\[1\]\.{path} is of version 2, the document"):
        read_record(document)
    document["version"] = 2
    assert read_record(document).to_json()["version"] == 2


def test_the_parts_of_an_expert_have_its_number() -> None:
    gate, up = Part("e.*.gate"), Part("e.up.*", "e.up_bias.*")
    experts = Experts(8, 2, Part("r"), "of_all")
    block = FeedForward(up, Part("e.*.down"), "silu", gate, experts=experts)
    wanted = FeedForward(Part("e.up.7", "e.up_bias.7"), Part("e.7.down"), "silu", Part("e.7.gate"))
    assert block.of_expert(7) == wanted


@pytest.fixture
def document(make_vectors: ModuleType) -> dict[str, Any]:
    """A document with every record in it."""
    found: dict[str, Any] = make_vectors.tiny_record().to_json()
    return found


def test_null_and_absence_are_the_same(document: dict[str, Any]) -> None:
    record = read_record(document)
    document["layers"][1]["attention"]["window"] = None
    document["layers"][1]["attention_in"] = None
    document["layers"][1]["parallel"] = False
    assert read_record(document) == record


def at(document: Any, path: str) -> tuple[Any, Any]:
    """The object or list that holds the last step of a path such as "layers.0.scale", and it."""
    *way, last = (int(step) if step.isdigit() else step for step in path.split("."))
    for step in way:
        document = document[step]
    return document, last


HUGE = 10**400
NUMBER = "allowed a finite number"
WHOLE = "allowed a whole number from 0 to 9223372036854775807"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("hidden", 8.0, f"decoder.json.hidden: 8.0, {WHOLE}"),
        ("hidden", True, f"decoder.json.hidden: True, {WHOLE}"),
        ("hidden", -1, f"decoder.json.hidden: -1, {WHOLE}"),
        ("hidden", 2**63, f"decoder.json.hidden: 9223372036854775808, {WHOLE}"),
        ("hidden", "8", f"decoder.json.hidden: '8', {WHOLE}"),
        ("hidden", None, f"decoder.json.hidden: None, {WHOLE}"),
        ("hidden", 0, "decoder.json.hidden: 0, allowed 1 or more"),
        ("context", 0, "decoder.json.context: 0, allowed 1 or more"),
        ("kv_heads", 0, "decoder.json.kv_heads: 0, allowed 1 or more"),
        ("heads", 0, "decoder.json.heads: 0, allowed 1 or more"),
        ("heads", 3, "decoder.json.kv_heads: 2, allowed a divisor of 3 heads"),
        ("project_in", None, "decoder.json.embedding_width: 6, allowed 8 without project_in"),
        ("embedding", 1, "decoder.json.embedding: 1, allowed a string"),
        ("embedding", None, "decoder.json.embedding: None, allowed a string"),
        ("logit_scale", "1", f"decoder.json.logit_scale: '1', {NUMBER}"),
        ("logit_scale", float("nan"), f"decoder.json.logit_scale: nan, {NUMBER}"),
        ("logit_scale", float("inf"), f"decoder.json.logit_scale: inf, {NUMBER}"),
        ("logit_scale", HUGE, "decoder.json.logit_scale: 10000"),
        ("logit_scale", False, f"decoder.json.logit_scale: False, {NUMBER}"),
        ("logit_softcap", 0, "decoder.json.logit_softcap: 0.0, allowed more than 0"),
        ("end_tokens", 2, "decoder.json.end_tokens: 2, allowed a list"),
        ("end_tokens", [0] * 65537, "decoder.json.end_tokens: [0, 0"),
        ("end_tokens", [2, -1], f"decoder.json.end_tokens[1]: -1, {WHOLE}"),
        ("layers", [], "decoder.json.layers: (), allowed one layer or more"),
        ("layers", {}, "decoder.json.layers: {}, allowed a list"),
        ("layers.1", 3, "decoder.json.layers[1]: 3, allowed an object"),
        ("layers.0.parallel", 1, "decoder.json.layers[0].parallel: 1, allowed true or false"),
        ("layers.0.parallel", None, "decoder.json.layers[0].parallel: None, allowed true"),
        ("layers.1.attention.rope", 2, "layers[1].attention.rope: 2, allowed an index of 2 ropes"),
        ("layers.0.attention.window", 0, "layers[0].attention.window: 0, allowed 1 or more"),
        (
            "layers.0.attention.softcap",
            -1.0,
            "layers[0].attention.softcap: -1.0, allowed more than 0",
        ),
        ("layers.0.attention.q.rows.run", 0, "layers[0].attention.q.rows.run: 0, allowed 1"),
        ("layers.0.attention.q.rows.run", 13, "attention.q.rows.step: 12, allowed 13 or more"),
        ("layers.0.attention.k", "k", "layers[0].attention.k: 'k', allowed an object"),
        ("layers.0.feed_forward.activation", "tanh", "allowed silu or gelu or gelu_tanh or relu"),
        ("layers.0.feed_forward.activation", [], "layers[0].feed_forward.activation: []"),
        ("layers.0.ffn_in.kind", "batch", "layers[0].ffn_in.kind: 'batch', allowed rms or layer"),
        (
            "layers.0.ffn_in.kind",
            "rms",
            "layers[0].ffn_in.bias: 'a.norm.bias', allowed in a norm of",
        ),
        ("layers.0.ffn_in.epsilon", -1e-5, "layers[0].ffn_in.epsilon: -1e-05, allowed 0 or more"),
        (
            "ropes.0.inverse_frequencies",
            [],
            "ropes[0].inverse_frequencies: (), allowed 1 to 2 items",
        ),
        (
            "ropes.1.inverse_frequencies",
            [1, 2, 3],
            "ropes[1].inverse_frequencies: (1.0, 2.0, 3.0), allowed 1 to 2",
        ),
        (
            "ropes.0.inverse_frequencies",
            [1],
            "ropes[0].long_inverse_frequencies: (0.5, 0.001), allowed 1",
        ),
        ("ropes.0.switch", None, "ropes[0].long_inverse_frequencies: (0.5, 0.001), allowed 0"),
        ("ropes.0.inverse_frequencies.1", "x", f"ropes[0].inverse_frequencies[1]: 'x', {NUMBER}"),
        ("version", "1", f"decoder.json.version: '1', {WHOLE}"),
        ("version", True, f"decoder.json.version: True, {WHOLE}"),
        ("version", 1.0, f"decoder.json.version: 1.0, {WHOLE}"),
    ],
)
def test_a_wrong_value_names_its_place(
    document: dict[str, Any], path: str, value: object, message: str
) -> None:
    holder, key = at(document, path)
    holder[key] = value
    with pytest.raises(CorruptError) as caught:
        read_record(document)
    assert message in str(caught.value)
    assert str(caught.value).startswith("decoder.json")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("version", [0, 3, 2**40])
def test_another_version_is_not_guessed_at(version: int) -> None:
    message = rf"version {version}, this reader knows 1 to 2; update"
    with pytest.raises(UnsupportedError, match=message):
        read_record({"version": version, "something": "else"})


@pytest.mark.parametrize("path", ["", "layers.0", "layers.1.attention.q", "ropes.0", "final_norm"])
def test_an_unknown_key_is_named(document: dict[str, Any], path: str) -> None:
    holder, key = at(document, f"{path}.later" if path else "later")
    holder[key] = 1
    with pytest.raises(CorruptError, match=r"^decoder\.json.* has unknown key 'later'; "):
        read_record(document)


NEEDED = [
    "version",
    *(f.name for f in dataclasses.fields(DecoderRecord) if f.default is dataclasses.MISSING),
    *("layers.0.attention", "layers.1.attention.scale", "layers.0.feed_forward.activation"),
    *("layers.0.attention.q.weight", "layers.0.attention.q.rows.step", "final_norm.epsilon"),
    "ropes.1.inverse_frequencies",
]


@pytest.mark.parametrize("path", NEEDED)
def test_a_missing_key_is_named(document: dict[str, Any], path: str) -> None:
    holder, key = at(document, path)
    del holder[key]
    with pytest.raises(CorruptError, match=rf"^decoder\.json.* lacks key '{key}'; "):
        read_record(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-1], "decoder.json is not valid JSON"),
        (lambda text: text + b"{}", "decoder.json is not valid JSON"),
        (lambda _: b"\xff", "decoder.json is not valid JSON"),
        (lambda _: b"[1]", "decoder.json is no object"),
        (lambda _: b"[" * 9999, "decoder.json nests deeper than 16 levels"),
        (lambda text: text[:-1] + b', "heads": 2}', "decoder.json key 'heads' appears twice"),
        (lambda text: text.replace(b"30.0", b"NaN"), "number NaN, allowed finite numbers"),
        (lambda text: text.replace(b"30.0", b"1e999"), "decoder.json.logit_softcap: inf"),
        (lambda text: text.replace(b"30.0", b"1" * 5000), "decoder.json number of 5000 digits"),
        (lambda text: text + b" " * MAX_RECORD_SIZE, "decoder.json has 16"),
    ],
)
def test_text_that_is_no_document(
    document: dict[str, Any], change: Callable[[bytes], bytes], message: str
) -> None:
    with pytest.raises(CorruptError, match=message):
        parse_record(change(json.dumps(document).encode()))

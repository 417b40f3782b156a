"""Tensors as a record names them: rows reordered, and what does not fit refused in one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import cvxq
import numpy as np
import pytest
from cvxq.lean import record_of
from cvxq.lean.errors import NotLeanError
from cvxq.lean.products import Product, find_products
from cvxq.lean.weights import read_product
from cvxq_format import Codebook, CompandedTensor, CorruptError, RawTensor, Reader, dequantize
from cvxq_format.decoder_record import DecoderRecord, Part, Rows, read_record
from cvxq_kernels import cpu

MakeFile = Callable[..., Any]
BOOK = Codebook.default()


class Held:
    """Tensors in memory."""

    aliases: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, **tensors: RawTensor | CompandedTensor) -> None:
        self.tensors = tensors

    def read(self, name: str) -> RawTensor | CompandedTensor:
        return self.tensors[name]

    def codebook(self, index: int) -> Codebook:
        return BOOK


TURNS = tuple((Rows(4 * place, 4, 12), 8) for place in range(3))  # two heads of q, k, v
ORDER = [*range(4), *range(12, 16), *range(4, 8), *range(16, 20), *range(8, 12), *range(20, 24)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_rows_of_a_packed_matrix_change_places(
    transposed: bool, permuted: bool, random_companded: Callable[..., CompandedTensor]
) -> None:
    tensor = random_companded((24, 40), 3, transposed=transposed, permuted=permuted)
    bias = np.arange(24, dtype=np.float32)
    held = Held(w=tensor, b=RawTensor("f32", (24,), bias))
    value, added = read_product(held, Product("w", "b", TURNS, 40))
    assert isinstance(value, CompandedTensor)
    expected = dequantize(tensor, BOOK)[ORDER]
    np.testing.assert_array_equal(dequantize(value, BOOK), expected)
    assert added is not None
    assert added.tolist() == ORDER
    if cpu.is_available():
        matrix = cpu.Matrix.from_tensor(value, BOOK)
        np.testing.assert_array_equal(matrix.rows(range(24)), expected)
        x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
        np.testing.assert_allclose(matrix.matmul(x, exact=True), x @ expected.T, atol=1e-3)


def test_rows_of_a_raw_matrix_change_places() -> None:
    dense = np.arange(24 * 5, dtype=np.float16).reshape(24, 5)
    held = Held(w=RawTensor("f16", (24, 5), dense))
    value, _ = read_product(held, Product("w", None, TURNS, 5))
    assert isinstance(value, RawTensor)
    np.testing.assert_array_equal(value.data, dense[ORDER])


@pytest.mark.parametrize(
    "rows",
    [
        ((Rows(0, 8, 8), 8), (Rows(0, 8, 8), 8), (Rows(16, 8, 8), 8)),  # some twice
        ((Rows(0, 8, 8), 8), (Rows(8, 8, 8), 8), (Rows(17, 8, 8), 8)),  # beyond the end
        ((Rows(0, 0, 8), 8), (Rows(8, 8, 8), 8), (Rows(16, 8, 8), 8)),
        ((Rows(0, 3, 8), 8), (Rows(8, 8, 8), 8), (Rows(16, 8, 8), 8)),
        ((Rows(1 << 70, 8, 8), 8), (Rows(8, 8, 1 << 80), 8), (None, 8)),
        ((None, 8), (None, 8), (None, 8)),
    ],
)
def test_rows_that_are_not_each_once(rows: Any) -> None:
    held = Held(w=RawTensor("f32", (24, 5), np.zeros((24, 5), np.float32)))
    with pytest.raises(CorruptError, match="parts of 'w' are not each of its 24 rows once"):
        read_product(held, Product("w", None, rows, 5))


def test_matrices_that_some_parts_share(make_file: MakeFile) -> None:
    with Reader(make_file("gpt2").path) as reader:
        record = record_of(reader)
        layer = record.layers[0]
        assert len(find_products(record, reader).layers[0].qkv) == 1
        stray = dataclasses.replace(layer.attention, q=Part("other"))
        changed = dataclasses.replace(
            record, layers=(dataclasses.replace(layer, attention=stray), *record.layers[1:])
        )
        with pytest.raises(NotLeanError, match="only some of what reads one input lies in"):
            find_products(changed, reader)


def test_a_tied_embedding_is_the_head(make_file: MakeFile) -> None:
    for kind, tied in (("llama", False), ("llama-tied", True)):
        with Reader(make_file(kind, f"{kind}.cvxq").path) as reader:
            found = find_products(record_of(reader), reader)
            assert (found.embedding == found.head) == tied


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """`document` with the item at `path` replaced, or left out if `value` is ...."""
    copied = json.loads(json.dumps(document))
    place = copied
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copied


ATTENTION, BLOCK = ("layers", 1, "attention"), ("layers", 1, "feed_forward")
DAMAGE: list[tuple[tuple[Any, ...], Any, str]] = [
    (("hidden",), 33, "embedding_width"),
    (("hidden",), 1 << 40, "embedding_width"),
    (("heads",), 8, "needs"),
    (("heads",), 3, "kv_heads"),
    (("heads",), 1 << 60, "heads · head_dim is 9223372036854775808, allowed up to"),
    (("head_dim",), 16, "needs"),
    (("ffn",), 49, "needs"),
    (("ffn",), 1 << 40, "ffn is 1099511627776, allowed up to"),
    (("vocabulary",), 97, "needs"),
    (("vocabulary",), 1 << 33, "allowed up to"),
    (("context",), 1 << 40, "allowed up to"),
    (("position_offset",), 1 << 40, "allowed up to"),
    (("embedding",), "nothing", "names tensor 'nothing', not in the file"),
    (("head", "bias"), "model.norm.weight", "has shape (32,)"),
    (("ropes", 0, "switch"), 8, "long_inverse_frequencies"),
    (("positions",), "model.norm.weight", "has shape (32,)"),
    (("final_norm", "weight"), "model.embed_tokens.weight", "has shape (96, 32)"),
    ((*ATTENTION, "rope"), 7, "index of 1 ropes"),
    ((*ATTENTION, "window"), 0, "1 or more"),
    ((*ATTENTION, "q_norm"), {"kind": "rms", "epsilon": 1e-6, "weight": "model.norm.weight"}, "(8"),
    ((*ATTENTION, "k", "weight"), "model.norm.weight", "has shape (32,)"),
    ((*ATTENTION, "k", "rows"), {"first": 0, "run": 8, "step": 9}, "not each of its 16 rows once"),
    ((*ATTENTION, "o"), ..., "lacks key 'o'"),
    ((*BLOCK, "up", "weight"), "model.layers.1.mlp.down_proj.weight", "has shape (32, 48)"),
]


@pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())
@pytest.mark.parametrize(("path", "value", "reason"), DAMAGE)
def test_a_damaged_record_is_one_line(
    path: tuple[Any, ...], value: Any, reason: str, make_file: MakeFile
) -> None:
    """Records that contradict themselves or the tensors; nothing reaches the kernels."""
    with Reader(make_file("llama").path) as reader:
        document = json.loads(reader.file("decoder.json"))
    blob = json.dumps(changed(document, path, value)).encode()
    made = make_file("llama", "damaged.cvxq", files={"decoder.json": blob})
    with pytest.raises(CorruptError) as caught:
        cvxq.load(made.path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("blob", [b"", b"[]", b"\xff", b'{"version": 1', b"[" * 100_000])
def test_a_record_that_is_no_object(blob: bytes, make_file: MakeFile) -> None:
    made = make_file("llama", files={"decoder.json": blob})
    with pytest.raises(CorruptError, match=r"^decoder\.json"):
        cvxq.load(made.path)


def test_a_record_survives_its_document(lean_kind: str, make_file: MakeFile) -> None:
    with Reader(make_file(lean_kind).path) as reader:
        record = record_of(reader)
    assert isinstance(record, DecoderRecord)
    assert read_record(json.loads(json.dumps(record.to_json()))) == record

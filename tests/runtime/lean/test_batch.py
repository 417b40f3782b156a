"""Texts that are read together get what each would get alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cvxq.lean import record_of
from cvxq.lean.native_decoder import NativeDecoder
from cvxq_format import Reader
from cvxq_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())

# Of float32 logits; matrices give a row the same bits beside any others, attention does not.
TOLERANCE = 1e-5
TEXTS = [[(7 * index + 3 * text) % 96 for index in range(length)] for text, length in
         enumerate((1, 23, 9, 40, 2))]  # fmt: skip

MakeFile = Callable[..., Any]


@contextmanager
def decoder_of(path: Any, **options: Any) -> Iterator[NativeDecoder]:
    with Reader(path) as reader:
        options = {"threads": 2, "exact": True, **options}
        yield NativeDecoder(record_of(reader), reader, **options)


def test_every_text_gets_what_it_gets_alone(lean_kind: str, make_file: MakeFile) -> None:
    """Ragged prompts, in calls that hold fewer tokens than there are; then token by token."""
    with decoder_of(make_file(lean_kind).path, chunk=32) as decoder:
        batch = decoder.batch(len(TEXTS), 64)
        texts = [list(ids) for ids in TEXTS]
        pieces = list(enumerate(texts))
        for _ in range(4):
            found = batch.read(pieces)
            expected = np.stack([decoder.logits(ids)[-1] for ids in texts])
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
            assert (found.argmax(1) == expected.argmax(1)).all()
            pieces = [(text, [int(row.argmax())]) for text, row in enumerate(found)]
            for text, ids in pieces:
                texts[text] += ids


@pytest.mark.parametrize("kind", ["llama", "phi3-longrope"])
def test_rewinding_and_copying(kind: str, make_file: MakeFile) -> None:
    """A text of 33 tokens of longrope is long, and so is its copy, until it is rewound."""
    with decoder_of(make_file(kind).path) as decoder:
        batch = decoder.batch(3, 64)
        long = [*TEXTS[3], 7]
        batch.read([(0, long[:-1]), (2, TEXTS[1])])
        batch.copy(0, 1, 38)
        batch.rewind(2, 4)
        found = batch.read([(2, [5, 6]), (1, [9]), (0, long[-1:])])
        alone = [[*TEXTS[1][:4], 5, 6], [*long[:38], 9], long]
        expected = np.stack([decoder.logits(ids)[-1] for ids in alone])
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_fast_products_are_close(make_file: MakeFile) -> None:
    """Alone, inputs are rounded to 8 bits; of several texts fewer are."""
    with decoder_of(make_file("llama").path, exact=False) as decoder:
        found = decoder.batch(len(TEXTS), 64).read(list(enumerate(TEXTS)))
        expected = np.stack([decoder.logits(ids)[-1] for ids in TEXTS])
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05 * expected.std()


def test_memory_bounds_the_number_of_texts(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with decoder_of(make_file("llama").path) as decoder:
        per_text = 64 * 2 * 2 * 8 * 4 * 2  # tokens, layers, key heads, width, bytes, both
        for free, texts in ((0, 1), (2 * per_text * 3, 3), (None, 16), (1 << 40, 16)):
            monkeypatch.setattr("cvxq.lean.native_decoder.available_memory", lambda free=free: free)
            assert decoder.batch(99, 64).texts == texts


def test_capacity_bounds_every_text(make_file: MakeFile) -> None:
    with decoder_of(make_file("llama").path) as decoder:
        batch = decoder.batch(2, 64)
        batch.read([(0, [7] * 64), (1, [7] * 60)])
        with pytest.raises(ValueError, match="positions below 64"):
            batch.read([(0, [1]), (1, [1])])
        with pytest.raises(ValueError, match="allowed are tokens"):
            batch.read([(1, [1]), (1, [2])])
        assert np.isfinite(batch.read([(1, [1])])).all()

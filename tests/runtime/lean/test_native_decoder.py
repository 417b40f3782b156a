"""The native decoder against the transformers network of the same weights, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cvxq
import numpy as np
import numpy.typing as npt
import pytest
import torch
from cvxq.lean import record_of
from cvxq.lean.native_decoder import NativeDecoder
from cvxq_format import Reader
from cvxq_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())

# The same float32 products, summed in another order.
TOLERANCE = 1e-4
IDS = [token * 7 % 96 for token in range(60)]  # longer than any window, within every context

MakeFile = Callable[..., Any]
Floats = npt.NDArray[np.float32]


def logits_of(network: torch.nn.Module, ids: list[int]) -> Floats:
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        output = network(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
    found: Floats = output.numpy()
    return found


@contextmanager
def decoder_of(path: Any, **options: Any) -> Iterator[NativeDecoder]:
    with Reader(path) as reader:
        options = {"threads": 2, "exact": True, **options}
        yield NativeDecoder(record_of(reader), reader, **options)


def test_logits_equal_transformers(lean_kind: str, make_file: MakeFile) -> None:
    made = make_file(lean_kind)
    expected = logits_of(made.network, IDS)
    assert expected.std() > 20 * TOLERANCE  # else equality would say nothing
    with decoder_of(made.path) as decoder:
        found = decoder.logits(IDS)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_added_biases_count(make_file: MakeFile) -> None:
    made = make_file("llama", add_biases=True)
    with decoder_of(made.path) as decoder:
        found = decoder.logits(IDS)
    np.testing.assert_allclose(found, logits_of(made.network, IDS), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "opt"])
def test_pieces_of_a_prompt_give_what_the_whole_does(
    kind: str, chunk: int, make_file: MakeFile
) -> None:
    made = make_file(kind)
    expected = logits_of(made.network, IDS)
    with decoder_of(made.path, chunk=chunk, threads=1) as decoder:
        found = decoder.feed(IDS[:50])
        np.testing.assert_allclose(found, expected[49], atol=TOLERANCE, rtol=0)
        for place in range(50, 60):
            found = decoder.feed([IDS[place]])
            np.testing.assert_allclose(found, expected[place], atol=TOLERANCE, rtol=0)
        assert decoder.length == 60


def test_a_text_that_crosses_the_switch_is_read_anew(make_file: MakeFile) -> None:
    """Each text is turned as its length says, forward and back; 32 is the longest short one."""
    made = make_file("phi3-longrope")

    def is_right(found: Floats, ids: list[int]) -> None:
        expected = logits_of(made.network, ids)[-1]
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)

    short, long = logits_of(made.network, IDS[:32]), logits_of(made.network, IDS[:33])
    assert np.abs(short[-1] - long[-2]).max() > 100 * TOLERANCE
    with decoder_of(made.path, chunk=10) as decoder:
        is_right(decoder.feed(IDS[:30]), IDS[:30])
        for place in range(30, 35):
            is_right(decoder.feed([IDS[place]]), IDS[: place + 1])
            assert decoder.length == place + 1
        decoder.rewind(20)
        is_right(decoder.feed([5]), [*IDS[:20], 5])
        is_right(decoder.feed(IDS[:30]), [*IDS[:20], 5, *IDS[:30]])
        decoder.rewind(40)
        is_right(decoder.feed([7]), [*IDS[:20], 5, *IDS[:19], 7])
        np.testing.assert_allclose(decoder.logits(IDS[:32]), short, atol=TOLERANCE, rtol=0)
        is_right(decoder.feed([IDS[32]]), IDS[:33])
        assert decoder.length == 33


def test_layers_turn_by_tables_of_their_own(make_file: MakeFile) -> None:
    """The tests of every family count on it: Gemma 3's layers differ."""
    with Reader(make_file("gemma3").path) as reader:
        record = record_of(reader)
    assert [layer.attention.rope for layer in record.layers] == [0, 1]
    assert record.ropes[0] != record.ropes[1]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int, make_file: MakeFile) -> None:
    path = make_file("qwen3").path
    with decoder_of(path, threads=3) as one, decoder_of(path, threads=threads) as other:
        assert np.array_equal(one.logits(IDS), other.logits(IDS))
        assert np.array_equal(one.feed([5]), other.feed([5]))


def test_rewinding_forgets(make_file: MakeFile) -> None:
    with decoder_of(make_file("llama").path) as decoder:
        decoder.feed(IDS[:20])
        expected = decoder.feed(IDS[20:30])
        decoder.feed([1, 2, 3])
        decoder.rewind(20)
        assert decoder.length == 20
        assert np.array_equal(decoder.feed(IDS[20:30]), expected)
        decoder.rewind(100)
        assert decoder.length == 30


def test_capacity_and_vocabulary_bound_what_is_read(make_file: MakeFile) -> None:
    with decoder_of(make_file("llama").path) as decoder:
        assert (decoder.capacity, decoder.vocabulary) == (64, 96)
        decoder.feed([7] * 64)
        for tokens in ([1], [96], [-1]):
            decoder.rewind(64 if tokens == [1] else 10)
            length = decoder.length
            with pytest.raises(ValueError, match="allowed are tokens 0 to 95"):
                decoder.feed(tokens)
            assert decoder.length == length


def test_a_tied_matrix_is_held_once(make_file: MakeFile) -> None:
    """Also where the head gained a bias: the embedding looks its rows up in the same matrix."""
    sizes = {}
    for biases in (False, True):
        made = make_file("llama-tied", f"{biases}.cvxq", add_biases=biases)
        with decoder_of(made.path) as decoder:
            sizes[biases] = decoder.bytes_per_token
            expected = logits_of(made.network, IDS)
            np.testing.assert_allclose(decoder.logits(IDS), expected, atol=TOLERANCE, rtol=0)
    gained = 4 * (96 + 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32))
    tiles = 3 + 2 * (1 + 1 + 1 + 1 + 2 + 2 + 1)  # of clusters of 32 rows; 64 lanes in each
    gained += tiles * 4 * 64  # the biases again, lane by lane
    assert sizes[True] - sizes[False] <= gained + 64 * 15  # biases, each padded to a cache line


def test_the_fast_products_are_close(make_file: MakeFile) -> None:
    """Integer products may add a twentieth of the quantization error, which is far below this."""
    made = make_file("llama")
    expected = logits_of(made.network, IDS)
    with decoder_of(made.path, exact=False) as decoder:
        found = np.stack([decoder.feed([token]) for token in IDS])
    error = np.sqrt(np.mean((found - expected) ** 2))
    assert error < 0.05 * expected.std()


def test_time_outside_products_is_counted(make_file: MakeFile) -> None:
    with decoder_of(make_file("llama").path) as decoder:
        assert decoder.overhead_seconds() == 0
        decoder.feed(IDS)
        assert 0 < decoder.overhead_seconds() < 10


def test_load_takes_the_decoder(make_file: MakeFile) -> None:
    with cvxq.load(make_file("llama").path, threads=2) as model:
        assert isinstance(model.decoder, NativeDecoder)
        assert model.transformers_reason is None
        assert model.decoder.threads == 2

"""The torch decoder computes what transformers does, in pieces as at once, and draws by the rules.

On a CPU its matrices are expanded and nothing is captured; what happens between the matrices, the
cache, sampling and the pipelined loop are those of the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cvxq import cuda
from cvxq.errors import ContextError
from cvxq.lean import record_of
from cvxq.lean.cuda import decoder as cuda_decoder
from cvxq.lean.cuda.decoder import TorchDecoder
from cvxq.lean.cuda.network import TorchNetwork
from cvxq.lean.cuda.weights import DenseWeight, Pack, Weight, load_weights
from cvxq.sample import SamplingSettings
from cvxq_format import Reader
from cvxq_kernels import PackedWeight, UnsupportedWeightError
from torch.nn import functional

MakeFile = Callable[..., Any]

IDS = [(7 * index + 3) % 96 for index in range(40)]  # longer than the windows of 8
CPU = torch.device("cpu")
TOLERANCE = 1e-3  # of float32 logits, as the decoders promise; what is found is near 1e-5


def network_of(
    made: Any, dtype: torch.dtype = torch.float32, pack: Pack | None = None
) -> TorchNetwork:
    with Reader(made.path) as reader:
        record = record_of(reader)
        weights = load_weights(record, reader, CPU, dtype, pack)
    return TorchNetwork(record, weights, CPU, dtype)


def expected_logits(made: Any, ids: list[int] = IDS) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = made.network(input_ids=torch.tensor([ids])).logits[0].float()
    return result


@pytest.fixture
def decoder(make_file: MakeFile) -> TorchDecoder:
    return TorchDecoder(network_of(make_file("llama")))


def test_logits_equal_transformers(lean_kind: str, make_file: MakeFile) -> None:
    made = make_file(lean_kind)
    expected = expected_logits(made)
    assert expected.std() > 0.01
    decoder = TorchDecoder(network_of(made), prefill_tokens=16)
    found = decoder.logits(IDS)
    assert float((found - expected).abs().max()) < TOLERANCE
    # In pieces, as a conversation comes: a chunk, then one by one.
    for end in (17, *range(30, 41)):
        start = decoder.length
        logits = decoder.feed(IDS[start:end])
        expected = expected_logits(made, IDS[:end])[-1]  # of a short text, if it is one so far
        assert float((logits - expected).abs().max()) < TOLERANCE


def test_added_biases(make_file: MakeFile) -> None:
    made = make_file("llama-tied", add_biases=True)
    found = TorchDecoder(network_of(made)).logits(IDS)
    assert float((found - expected_logits(made)).abs().max()) < TOLERANCE


class Packed:
    """A stand-in for weights that stay packed on a GPU: expands on every use."""

    def __init__(self, parts: Sequence[PackedWeight]) -> None:
        if any(part.transposed for part in parts):
            raise UnsupportedWeightError("transposed")
        self.parts = parts
        self.nbytes = sum(part.nbytes for part in parts)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(x, torch.cat([part.dense(x.dtype) for part in self.parts]), bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.parts[0].rows(ids)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt-neox"])
def test_weights_that_stay_packed(kind: str, make_file: MakeFile) -> None:
    """Some of the files' matrices are transposed, so all ways of fusing occur."""
    made = make_file(kind, add_biases=True)
    kinds = set()

    def pack(parts: Sequence[PackedWeight]) -> Weight:
        packed = Packed(parts)
        kinds.add(len(parts))
        return packed

    network = network_of(made, pack=pack)
    assert 1 in kinds
    found = TorchDecoder(network).logits(IDS)
    assert float((found - expected_logits(made)).abs().max()) < TOLERANCE
    assert {type(weight) for weight in network.weights.multiplied()} == {Packed, DenseWeight}


def test_what_breaks_while_packing_is_not_hidden(make_file: MakeFile) -> None:
    """Only a weight that the kernels do not take is expanded instead."""

    def pack(parts: Sequence[PackedWeight]) -> Weight:
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    with pytest.raises(ValueError, match="cannot be accessed"):
        network_of(make_file("llama"), pack=pack)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2-window", "gemma2", "gemma3", "olmo2", "gpt-neox", "opt"]
)
def test_a_step_whose_length_only_the_device_knows(kind: str, make_file: MakeFile) -> None:
    """What a CUDA graph replays: the same launches at every length."""
    made = make_file(kind)
    decoder = TorchDecoder(network_of(made))
    expected = expected_logits(made)
    decoder.feed(IDS[:20])
    with torch.inference_mode():
        for index in range(20, 40):
            token, position = torch.tensor([IDS[index]]), torch.tensor([index])
            logits = decoder.network.forward(token, position, decoder.cache, None)
            assert float((logits[0] - expected[index]).abs().max()) < TOLERANCE


def test_logits_of_many_tokens_are_bounded(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_file("llama")
    monkeypatch.setattr(cuda_decoder, "LOGITS", 16 * 96)
    network, sizes = network_of(made), []
    forward = network.forward

    def watched(*arguments: Any) -> torch.Tensor:
        logits = forward(*arguments)
        sizes.append(len(logits))
        return logits

    monkeypatch.setattr(network, "forward", watched)
    found = TorchDecoder(network).logits(IDS)
    assert sizes == [16, 16, 8]
    assert float((found - expected_logits(made)).abs().max()) < TOLERANCE


def test_rewind(decoder: TorchDecoder) -> None:
    decoder.feed(IDS)
    decoder.rewind(10)
    assert decoder.length == 10
    other = [5, 6, 7]
    found = decoder.feed(other).clone()
    decoder.rewind(0)
    torch.testing.assert_close(decoder.feed([*IDS[:10], *other]), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, make_file: MakeFile) -> None:
    """Sums of thousands of rounded products stay within a few roundings of the logits' size."""
    made = make_file("llama")
    expected = expected_logits(made)
    found = TorchDecoder(network_of(made, dtype)).logits(IDS)
    assert found.dtype == torch.float32
    step = torch.finfo(dtype).eps
    assert float((found - expected).abs().max()) < 10 * step * float(expected.abs().max())


def test_the_cache_grows_to_the_context_and_no_further(make_file: MakeFile) -> None:
    made = make_file("llama")
    decoder = TorchDecoder(network_of(made))
    decoder.cache.grow(16, 0)  # smaller than any real one
    decoder.feed(IDS[:10])
    assert decoder.cache.places == 16
    logits = decoder.feed(IDS[10:])
    assert decoder.cache.places == 64
    assert float((logits - expected_logits(made)[-1]).abs().max()) < TOLERANCE
    with pytest.raises(ContextError, match="context of 64 tokens is full"):
        decoder.feed([1] * 25)
    decoder.feed([1] * 24)
    with pytest.raises(ContextError, match="context of 64 tokens is full"):
        decoder.feed([1])


def test_drawing_makes_room_for_all_that_may_come(decoder: TorchDecoder) -> None:
    decoder.cache.grow(16, 0)
    decoder.feed(IDS[:4])
    next(decoder.draw(SamplingSettings(max_tokens=30), IDS[:4]))
    assert decoder.cache.places == 64
    places = decoder.cache.keys[0].data_ptr()
    next(decoder.draw(SamplingSettings(max_tokens=500), IDS[:4]))
    assert decoder.cache.keys[0].data_ptr() == places


def test_nothing_is_allocated_anew_while_generating(decoder: TorchDecoder) -> None:
    def addresses() -> list[int]:
        held = [*decoder.cache.keys, *decoder.cache.values, decoder._token, decoder._logits]
        return [tensor.data_ptr() for tensor in held]

    decoder.feed(IDS)
    before = addresses()
    drawn = decoder.draw(SamplingSettings(seed=1), IDS)
    assert len([next(drawn) for _ in range(20)]) == 20
    assert addresses() == before


def test_drawing_reads_what_it_draws(decoder: TorchDecoder) -> None:
    """Greedy tokens are those of feeding and looking; the text ends where the context does."""
    logits = decoder.feed(IDS)
    expected = []
    for _ in range(24):
        expected.append(int(logits.argmax()))
        logits = decoder.feed(expected[-1:])
    expected.append(int(logits.argmax()))
    decoder.rewind(0)
    decoder.feed(IDS)
    found = []
    for token in decoder.draw(SamplingSettings(temperature=0), IDS):
        found.append(token)
        assert decoder.length == min(64, len(IDS) + len(found))
    assert found == expected


def test_a_text_goes_on_after_a_draw_that_was_left(decoder: TorchDecoder) -> None:
    decoder.feed(IDS)
    drawn = decoder.draw(SamplingSettings(temperature=0), IDS)
    first = [next(drawn) for _ in range(3)]
    drawn.close()
    assert decoder.length == len(IDS) + 3
    after = decoder.feed([9]).clone()
    decoder.rewind(0)
    torch.testing.assert_close(decoder.feed([*IDS, *first, 9]), after, atol=1e-5, rtol=0)


def test_drawing_crosses_the_switch(make_file: MakeFile) -> None:
    """Greedy tokens are those of texts read at once, which 33 tokens make long ones."""
    made = make_file("phi3-longrope")
    decoder = TorchDecoder(network_of(made))
    text = IDS[:29]
    decoder.feed(text)
    drawn = decoder.draw(SamplingSettings(temperature=0), text)
    for _ in range(7):
        logits = expected_logits(made, text)[-1]
        token = next(drawn)
        assert float(logits.max() - logits[token]) < TOLERANCE
        text = [*text, token]
        assert decoder.length == len(text)
    drawn.close()
    decoder.rewind(31)
    found = decoder.feed([9])
    expected = expected_logits(made, [*text[:31], 9])[-1]
    assert float((found - expected).abs().max()) < TOLERANCE


def test_the_seed_decides(decoder: TorchDecoder) -> None:
    def draw(seed: int | None) -> list[int]:
        decoder.rewind(0)
        decoder.feed(IDS)
        drawn = decoder.draw(SamplingSettings(temperature=2.0, seed=seed), IDS)
        return [next(drawn) for _ in range(12)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_bytes_per_token(make_file: MakeFile) -> None:
    """Expanded float32 matrices; an embedding counts only where it is the head."""
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48
    table = 96 * 32
    untied, tied = network_of(make_file("llama")), network_of(make_file("llama-tied", "t.cvxq"))
    assert untied.weights.bytes_per_token(untied.record) == 4 * (2 * layer + table)
    assert untied.weights.matrix_bytes() == 4 * (2 * layer + 2 * table)
    read = tied.weights.bytes_per_token(tied.record)
    assert read == tied.weights.matrix_bytes() == 4 * (2 * layer + table)
    mixed = network_of(make_file("mixtral", "m.cvxq"))
    layer = 32 * (32 + 16 + 16 + 32) + 2 * 3 * 32 * 48 + 4 * 32  # two experts of four, the router
    assert mixed.weights.bytes_per_token(mixed.record) == 4 * (2 * layer + table)


def test_penalized_tokens_stay_penalized(decoder: TorchDecoder) -> None:
    settings = SamplingSettings(temperature=0, repetition_penalty=1e6)
    decoder.feed(IDS)
    drawn = decoder.draw(settings, IDS)
    found = [next(drawn) for _ in range(10)]
    positive = Counter(found).most_common(1)[0][1]
    assert positive == 1
    assert not set(found) & set(IDS)


def test_without_graphs_it_says_so_once_and_goes_on(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens on a device where capturing fails, acted out on a CPU."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    monkeypatch.setattr(cuda, "capture", fail)
    said: list[str] = []
    made = make_file("llama")
    decoder = TorchDecoder(network_of(made), notify=said.append)
    decoder._uses_graphs = True
    decoder.feed(IDS[:-1])
    logits = decoder.feed(IDS[-1:])
    assert float((logits - expected_logits(made)[-1]).abs().max()) < TOLERANCE
    next(decoder.draw(SamplingSettings(), IDS))
    assert said == [
        "CUDA graphs cannot be used here, so every operation is launched by itself, which is "
        "slower (operation not permitted when stream is capturing)"
    ]


def test_no_memory_is_not_blamed_on_graphs(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(cuda, "capture", fail)
    said: list[str] = []
    decoder = TorchDecoder(network_of(make_file("llama")), notify=said.append)
    decoder._uses_graphs = True
    with pytest.raises(torch.OutOfMemoryError):
        decoder.feed(IDS[:1])
    assert not said


def test_a_captured_step_is_replayed(make_file: MakeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture serves all steps until the cache moves, and one each kind of sampling."""
    captured: list[object] = []

    def capture(compute: Callable[[], None], generator: object = None) -> Callable[[], None]:
        captured.append(generator)
        return compute

    monkeypatch.setattr(cuda, "capture", capture)
    decoder = TorchDecoder(network_of(make_file("llama")))
    decoder._uses_graphs = True
    decoder.cache.grow(16, 0)
    for token in IDS[:16]:
        decoder.feed([token])
    assert captured == [None]
    for token in IDS[16:20]:
        decoder.feed([token])
    assert captured == [None, None]
    for settings in (SamplingSettings(seed=1), SamplingSettings(seed=2, max_tokens=3)):
        next(decoder.draw(settings, IDS[:20]))
    assert len(captured) == 3
    next(decoder.draw(SamplingSettings(top_k=3), IDS[:20]))
    assert len(captured) == 4

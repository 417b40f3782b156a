"""The proof of a decoder's record: what it accepts, what it refuses, what it leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cvxq_converter.errors import NotDescribedError
from cvxq_converter.job import _open_exactly
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.quantize.rtn import quantize_network_rtn
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import LoadedModel, load_model
from cvxq_converter.stages import Stages
from cvxq_converter.write.proof import Decoder, OpenDecoder, StoredTensors, prove
from cvxq_format import CorruptError
from cvxq_format.decoder_record import DecoderRecord

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 4096,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, max_position_embeddings=4096),
    "mistral": lambda: transformers.MistralConfig(
        **SIZES, max_position_embeddings=8192, sliding_window=4096
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES,
        max_position_embeddings=8192,
        head_dim=16,
        query_pre_attn_scalar=12,
        sliding_window=4096,
        attn_logit_softcapping=2.0,
    ),
    "phi3": lambda: transformers.Phi3Config(
        **SIZES,
        max_position_embeddings=16384,
        original_max_position_embeddings=4096,
        sliding_window=2047,
        rope_parameters=LONG,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1
    ),
}

Model = tuple[LoadedModel, Quantized]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """Return make(kind, dtype): a loaded model and its matrices rounded to 4 bits."""

    def make(kind: str, dtype: torch.dtype = torch.float32) -> Model:
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder: Path = tmp_path_factory.mktemp(kind)
        network.save_pretrained(folder)
        options = ConversionOptions.of(bits=4, method="rtn", group_size=16, dtype=dtype)
        loaded = load_model(open_source(str(folder)), options)
        return loaded, quantize_network_rtn(loaded, options.target, options.method, Stages(None))

    return make


def altered(change: Callable[[DecoderRecord], DecoderRecord]) -> OpenDecoder:
    """A decoder that executes another record than it is given."""
    return lambda record, tensors: _open_exactly(change(record), tensors)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_record_is_proved_and_the_network_stays_as_it_was(
    make: Callable[..., Model], kind: str, dtype: torch.dtype
) -> None:
    loaded, result = make(kind, dtype)
    before = {n: (v.dtype, v.clone()) for n, v in loaded.network.state_dict().items()}
    settings = loaded.network.config.to_dict()
    proof = prove(loaded, result, _open_exactly)
    assert proof.error is None
    assert proof.record == loaded.describe(())
    assert loaded.network.config.to_dict() == settings
    for name, value in loaded.network.state_dict().items():
        assert value.dtype is before[name][0]
        assert torch.equal(value, before[name][1])


def test_the_matrices_of_the_decoder_that_proves_lie_in_a_file(
    make: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, result = make("llama")
    packed = sum(tensor.packed_codes.nbytes for tensor in result.tensors.values())
    sizes = []

    def opened(record: DecoderRecord, tensors: StoredTensors) -> Decoder:
        with tensors.scratch.file() as file:
            monkeypatch.setattr(tensors.scratch, "file", lambda: nullcontext(file))
            decoder = _open_exactly(record, tensors)
            sizes.append(os.fstat(file.fileno()).st_size)
        return decoder

    assert prove(loaded, result, opened).error is None
    assert sizes[0] >= packed


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_without_the_native_library_another_decoder_proves_it(
    make: Callable[..., Model], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvxq_kernels.cpu.is_available", lambda: False)
    loaded, result = make(kind, torch.float32)
    assert prove(loaded, result, _open_exactly).error is None
    wrong = altered(lambda r: replace(r, embedding_scale=1.01))
    assert prove(loaded, result, wrong).error is not None


def scores(record: DecoderRecord, **changes: Any) -> DecoderRecord:
    """The record with another attention in its last layer."""
    *others, last = record.layers
    attention = replace(last.attention, **changes)
    return replace(record, layers=(*others, replace(last, attention=attention)))


def turns(record: DecoderRecord, **changes: Any) -> DecoderRecord:
    return replace(record, ropes=tuple(replace(rope, **changes) for rope in record.ropes))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", lambda r: scores(r, scale=r.layers[1].attention.scale * 1.01)),
        ("llama", lambda r: replace(r, residual_scale=1.001)),
        ("llama", lambda r: turns(r, inverse_frequencies=r.ropes[0].inverse_frequencies[::-1])),
        ("mistral", lambda r: scores(r, window=None)),
        ("mistral", lambda r: scores(r, window=r.layers[1].attention.window + 1)),
        ("gemma2", lambda r: scores(r, softcap=None)),
        ("gemma2", lambda r: replace(r, embedding_scale=5.5)),
        ("phi3", lambda r: turns(r, switch=r.ropes[0].switch + 40)),
        ("phi3", lambda r: turns(r, long_factor=1.0)),
        ("gpt2", lambda r: replace(r, logit_scale=1.01)),
    ],
)
def test_a_wrong_record_is_not_proved(
    make: Callable[..., Model],
    kind: str,
    change: Callable[[DecoderRecord], DecoderRecord],
) -> None:
    proof = prove(*make(kind), altered(change))
    assert proof.record is None
    assert "computes something else" in str(proof.error)


@pytest.mark.parametrize("error", [NotDescribedError("no library"), CorruptError("wrong rows")])
def test_a_decoder_that_cannot_run_is_the_reason(
    make: Callable[..., Model], error: Exception
) -> None:
    def fail(record: DecoderRecord, tensors: StoredTensors) -> Decoder:
        raise error

    proof = prove(*make("llama"), fail)
    assert (proof.record, proof.error) == (None, error)


def test_long_windows_and_switches_are_proved_short(make: Callable[..., Model]) -> None:
    seen: list[DecoderRecord] = []

    def spy(record: DecoderRecord, tensors: StoredTensors) -> Decoder:
        seen.append(record)
        return _open_exactly(record, tensors)

    assert prove(*make("phi3"), spy).error is None
    numbers = [(r.layers[0].attention.window, r.ropes[0].switch) for r in seen]
    assert numbers == [(2047, 4096), (16, 32)]


def test_a_network_is_long_again_after_a_failure(make: Callable[..., Model]) -> None:
    loaded, result = make("phi3")
    record, shorter = loaded.describe(()), []

    def fail(found: DecoderRecord, tensors: StoredTensors) -> Decoder:
        if found.ropes[0].switch == record.ropes[0].switch:
            return _open_exactly(found, tensors)
        shorter.append(found)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prove(loaded, result, fail)
    assert shorter
    assert loaded.describe(()) == record

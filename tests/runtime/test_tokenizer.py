"""Tokenizers from the file alone give the ids that the original ones do, byte for byte."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxq
import pytest
import sentencepiece
from cvxq.sample import SamplingSettings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Быстрая лиса прыгает через ленивую собаку.",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "sphinx of black quartz, judge my vow; 0123456789",
] * 8

SAMPLE = (
    "The fox – “quick” – über  Größe?\n\tleading\u00a0space "
    "Привет, мир! 日本語のテキスト、中文。 한국어 नमस्ते مرحبا 👩‍👩‍👧 e\u0301 \u2028 end "
)

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def sentencepiece_files() -> dict[str, bytes]:
    """A Llama tokenizer as old checkpoints have it: the sentencepiece model and a config."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    return {
        "tokenizer.model": model.getvalue(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


@pytest.fixture(scope="module")
def byte_files() -> dict[str, bytes]:
    """A byte-level BPE tokenizer with a chat template of its own file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }


@pytest.fixture(params=["sentencepiece_files", "byte_files"])
def files(request: pytest.FixtureRequest) -> dict[str, bytes]:
    chosen: dict[str, bytes] = request.getfixturevalue(request.param)
    return chosen


def original(files: dict[str, bytes], folder: Path, config: bytes) -> Any:
    for name, data in {**files, "config.json": config}.items():
        (folder / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_and_text_equal_the_originals(
    files: dict[str, bytes], make_file: Callable[..., Any], tmp_path: Path
) -> None:
    made = make_file("llama", files=files)
    folder = tmp_path / "original"
    folder.mkdir()
    expected = original(files, folder, made.network.config.to_json_string().encode())
    with cvxq.load(made.path) as model:
        for text in (SAMPLE, SAMPLE[::-1], *LINES[:5], " ", "a", "<s></s><|end|>"):
            ids = model.encode(text)
            assert ids == expected(text)["input_ids"]
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            assert model.tokenizer.decode(ids, **options) == expected.decode(ids, **options)
        ids = model.encode(SAMPLE)
        assert model.tokenizer.decode(ids, skip_special_tokens=True).strip() == SAMPLE.strip()


def test_read_beside_the_weights_it_is_the_same(
    files: dict[str, bytes], make_file: Callable[..., Any]
) -> None:
    made = make_file("llama", files=files)
    with cvxq.load(made.path) as alone, cvxq.load(made.path, tokenizer=True) as beside:
        assert beside.encode(SAMPLE) == alone.encode(SAMPLE)


def test_streamed_text_equals_decoding_all(
    files: dict[str, bytes], make_file: Callable[..., Any]
) -> None:
    from cvxq.stream import TextStream

    with cvxq.load(make_file("llama", files=files).path) as model:
        ids = model.encode(SAMPLE)
        stream = TextStream(model.tokenizer)
        pieces = [stream.push(token) for token in ids]
        whole = model.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_chat_template_is_kept(
    byte_files: dict[str, bytes], make_file: Callable[..., Any]
) -> None:
    with cvxq.load(make_file("llama", files=byte_files).path) as model:
        ids = model.turns.encode([{"role": "user", "content": "Hi"}])
        assert ids == model.encode("[user] Hi\n[assistant] ")


def test_files_are_removed_again(
    files: dict[str, bytes],
    make_file: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with cvxq.load(make_file("llama", files=files).path) as model:
        assert model.encode("a fox")
    assert list(place.iterdir()) == []


def test_code_in_the_file_is_never_run(
    byte_files: dict[str, bytes], make_file: Callable[..., Any], tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    own = {
        "tokenizer.model": b"nothing",
        "tokenizer_config.json": json.dumps(config).encode(),
        "evil.py": f"open({str(mark)!r}, 'w')\n".encode(),
    }
    with (
        cvxq.load(make_file("llama", files=own).path) as model,
        pytest.raises(cvxq.CvxqError, match="cannot be built") as failure,
    ):
        model.encode("a")
    assert failure.value.exit_code == 5
    assert "\n" not in str(failure.value)
    assert not mark.exists()


def test_an_empty_prompt_becomes_the_beginning_of_a_text(
    byte_files: dict[str, bytes], make_file: Callable[..., Any]
) -> None:
    with cvxq.load(make_file("llama", files=byte_files).path) as model:
        assert model.encode("") == [model.tokenizer.eos_token_id]


def test_generation_from_text(byte_files: dict[str, bytes], make_file: Callable[..., Any]) -> None:
    # The tiny network knows 96 tokens, so the prompt is of single ASCII characters.
    settings = SamplingSettings(temperature=1.0, seed=3, max_tokens=8)
    with cvxq.load(make_file("llama", files=byte_files).path) as model:
        pieces: list[str] = []
        first = model.generate("!#", settings, on_text=pieces.append)
        assert first.prompt_ids == tuple(model.encode("!#"))
        assert first.text == "".join(pieces)
        assert model.generate("!#", settings) == first

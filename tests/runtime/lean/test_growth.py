"""Tokenizers that would make too much of a text are refused before they see one."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import cvxq
import pytest
from cvxq.errors import ArgumentError, InconsistentFileError
from cvxq.lean.fast_codec import FastCodec, check_growth
from cvxq.lean.growth import growth
from cvxq.tokenizer import load_tokenizer
from cvxq_format import Reader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers


def tokenizer(**stages: Any) -> Tokenizer:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    for name, stage in stages.items():
        setattr(made, name, stage)
    return made


def replacing(times: int, content: str) -> list[Any]:
    return [normalizers.Replace("e", content)] * times


def test_usual_stages_grow_little() -> None:
    llama = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert growth(tokenizer(normalizer=llama)) == 3
    assert growth(tokenizer(pre_tokenizer=pre_tokenizers.ByteLevel())) == 2
    assert growth(tokenizer()) == 1


@pytest.mark.parametrize(
    "stages",
    [
        {"normalizer": normalizers.Sequence(replacing(9, "e" * 200))},
        {"normalizer": normalizers.Replace(Regex(""), "e" * 2000)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 20)},
        {"decoder": decoders.Sequence([decoders.Replace("e", "e" * 200)] * 3)},
    ],
)
def test_stages_that_swell_a_text(stages: dict[str, Any]) -> None:
    with pytest.raises(InconsistentFileError, match="allowed 1024; do not use the file"):
        check_growth(tokenizer(**stages))


def test_a_character_map_grows_by_its_longest_text() -> None:
    blob = struct.pack("<I", 8) + bytes(8) + b"short\0" + b"x" * 5000 + b"\0"
    stage = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}
    document = json.loads(tokenizer().to_str())
    made = Tokenizer.from_str(json.dumps({**document, "normalizer": stage}))
    assert growth(made) == 5000


def test_a_file_with_such_a_tokenizer_is_refused(make_file: Callable[..., Any]) -> None:
    blob = tokenizer(normalizer=normalizers.Sequence(replacing(9, "e" * 200))).to_str().encode()
    files = {"tokenizer.json": blob, "tokenizer_config.json": b"{}"}
    made = make_file("llama", files=files)
    with cvxq.load(made.path) as model, pytest.raises(InconsistentFileError, match="bytes of one"):
        model.encode("e")


def test_so_it_is_where_transformers_reads_it(make_file: Callable[..., Any]) -> None:
    blob = tokenizer(normalizer=normalizers.Sequence(replacing(9, "e" * 200))).to_str().encode()
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}}
    files = {"tokenizer.json": blob, "tokenizer_config.json": json.dumps(own).encode()}
    made = make_file("llama", files=files)
    with Reader(made.path) as reader, pytest.raises(InconsistentFileError, match="bytes of one"):
        load_tokenizer(reader)


def test_halves_of_characters_are_no_text() -> None:
    with pytest.raises(ArgumentError, match="bytes that are not UTF-8"):
        FastCodec(tokenizer()).encode("a\udc80", False)


def test_what_the_library_raises_is_one_line() -> None:
    broken = Tokenizer(models.WordLevel({"b": 1}, unk_token="none"))
    with pytest.raises(InconsistentFileError, match="tokenizer fails on this text: WordLevel"):
        FastCodec(broken).encode("a", False)

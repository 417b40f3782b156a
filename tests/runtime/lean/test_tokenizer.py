"""Tokenizers without transformers give the same tokens and texts; others are left to it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cvxq.lean.tokenizer import read_tokenizer
from cvxq_format import Reader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Быстрая лиса прыгает через ленивую собаку.",
    "for i in range(10):\n    print(i)\n",
] * 8
LETTERS = [
    *"aé日 ▁\n\t.,'\u0301",
    "  ",
    "<s>",
    "</s>",
    "<unk>",
    " the",
    "Fox ",
    "👩‍👩‍👧",
    "</",
    "s>",
]

MakeFile = Callable[..., Any]


def byte_files(*, begins: bool = False, **changes: Any) -> dict[str, bytes]:
    """Files of a byte-level BPE tokenizer, which may put <s> before texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **changes,
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


ACCEPTED: dict[str, Callable[[], dict[str, bytes]]] = {
    "bytes": byte_files,
    "bytes with a beginning": lambda: byte_files(begins=True),
    "bytes and extra tokens": lambda: byte_files(
        additional_special_tokens=["</s>", {"__type": "AddedToken", "content": "<s>"}]
    ),
    "bytes and flags": lambda: byte_files(begins=True, add_bos_token=True, add_eos_token=False),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_tokens_and_texts_equal_those_of_transformers(
    name: str, make_file: MakeFile, tmp_path: Path
) -> None:
    files = ACCEPTED[name]()
    made = make_file("llama", files=files)
    folder = tmp_path / "original"
    folder.mkdir()
    for part, blob in {**files, "config.json": b'{"model_type": "llama"}'}.items():
        (folder / part).write_bytes(blob)
    theirs = AutoTokenizer.from_pretrained(folder)
    with Reader(made.path) as reader:
        ours = read_tokenizer(reader)
    assert ours is not None
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    rng = random.Random(0)
    options = {"clean_up_tokenization_spaces": False}
    for _ in range(400):
        text = "".join(rng.choice([*LETTERS, *LINES[:4]]) for _ in range(rng.randrange(9)))
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours(text, add_special_tokens=special)["input_ids"] == ids, text
            expected = theirs.decode(ids, skip_special_tokens=special, **options)
            assert ours.decode(ids, skip_special_tokens=special) == expected, text
        ids = [rng.randrange(400) for _ in range(6)]
        expected = theirs.decode(ids, skip_special_tokens=True, **options)
        assert ours.decode(ids, skip_special_tokens=True) == expected, ids


LEFT: dict[str, Callable[[], dict[str, bytes]]] = {
    "a sentencepiece model": lambda: {"tokenizer.model": b"pieces"},
    "extra special tokens": lambda: byte_files(additional_special_tokens=["<x>"]),
    "named special tokens": lambda: byte_files(extra_special_tokens={"image_token": "<s>"}),
    "extra tokens of another kind": lambda: byte_files(
        additional_special_tokens=[{"content": "<s>", "lstrip": True}]
    ),
    "a flag that the file contradicts": lambda: byte_files(add_bos_token=True),
    "a special token that is none": lambda: byte_files(pad_token="the"),
    "code": lambda: byte_files(auto_map={"AutoTokenizer": ["evil.Evil", None]}),
    "a broken file": lambda: {**byte_files(), "tokenizer.json": b"{"},
}


@pytest.mark.parametrize("name", LEFT)
def test_what_transformers_would_change_is_left_to_it(name: str, make_file: MakeFile) -> None:
    with Reader(make_file("llama", files=LEFT[name]()).path) as reader:
        assert read_tokenizer(reader) is None


def test_special_tokens_may_be_objects(make_file: MakeFile) -> None:
    token = {"content": "<s>", "lstrip": False, "special": True}
    with Reader(make_file("llama", files=byte_files(bos_token=token)).path) as reader:
        tokenizer = read_tokenizer(reader)
    assert tokenizer is not None
    assert tokenizer.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    "odd",
    [
        {"additional_special_tokens": 1.5},
        {"extra_special_tokens": [7]},
        {"extra_special_tokens": [{"lstrip": True}]},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"1": None}},
    ],
)
def test_a_config_that_lists_something_else_is_left_to_transformers(odd: dict[str, Any]) -> None:
    from cvxq.lean.fast_codec import read_fast_codec
    from tokenizers import Tokenizer, models

    blob = Tokenizer(models.BPE()).to_str().encode()
    assert read_fast_codec(blob, {}, {}) is not None
    assert read_fast_codec(blob, odd, {}) is None

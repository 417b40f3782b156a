"""The chat template of a file, wherever its source kept it, with transformers and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import cvxq
import pytest
from cvxq.errors import InconsistentFileError
from cvxq.templates import chat_template
from cvxq_format import Reader
from tokenizers import Tokenizer, models

MakeFile = Callable[..., Any]


def settings(template: object) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()}


def old(template: object) -> dict[str, bytes]:
    return {"chat_template.json": json.dumps({"chat_template": template}).encode()}


LIST = [{"name": "tools", "template": "T"}, {"name": "default", "template": "L"}]
PLACES: dict[str, tuple[dict[str, bytes], str | None]] = {
    "nowhere": ({}, None),
    "a file of its own": ({"chat_template.jinja": b"J"}, "J"),
    "a file as some editors save it": ({"chat_template.jinja": b"\xef\xbb\xbfJ"}, "J"),
    "a folder of templates": ({"additional_chat_templates/default.jinja": b"D"}, "D"),
    "a folder beside the default": (
        {"additional_chat_templates/a.jinja": b"A", "chat_template.jinja": b"J"},
        "J",
    ),
    "the tokenizer's settings": (settings("S"), "S"),
    "a list in the tokenizer's settings": (settings(LIST), "L"),
    "a list without a default": (settings(LIST[:1]), "T"),
    "the processor's settings": (old("O"), "O"),
    "a list in the processor's settings": (old(LIST), "L"),
    "the settings of both": (settings("S") | old("O"), "S"),
    "everywhere": (settings("S") | old("O") | {"chat_template.jinja": b"J"}, "J"),
    "a folder beside settings": (
        settings("S") | {"additional_chat_templates/a.jinja": b"A"},
        "S",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_found(place: str, make_file: MakeFile) -> None:
    files, expected = PLACES[place]
    with Reader(make_file("llama", files=files).path) as reader:
        assert chat_template(reader) == expected


@pytest.mark.parametrize("wrong", [5, [5], [{"name": "a"}], {"name": "a", "template": 5}, [LIST]])
def test_a_template_that_is_none_is_an_error(wrong: object, make_file: MakeFile) -> None:
    with (
        Reader(make_file("llama", files=settings(wrong)).path) as reader,
        pytest.raises(InconsistentFileError, match="json of the file: chat_temp"),
    ):
        chat_template(reader)


def test_a_template_that_is_no_text_is_an_error(make_file: MakeFile) -> None:
    with (
        Reader(make_file("llama", files={"chat_template.jinja": b"a\xff"}).path) as reader,
        pytest.raises(InconsistentFileError, match=r"chat_template.jinja .* byte 1 is not UTF-8"),
    ):
        chat_template(reader)


@pytest.mark.parametrize("extra", [{}, {"additional_special_tokens": ["a"]}])
@pytest.mark.parametrize("place", [name for name in PLACES if name != "nowhere"])
def test_the_tokenizer_has_it(place: str, extra: dict[str, object], make_file: MakeFile) -> None:
    """The extra settings have transformers build the tokenizer."""
    files, expected = PLACES[place]
    config = json.loads(files.get("tokenizer_config.json", b"{}")) | extra
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    own = {
        "tokenizer.json": Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    with cvxq.load(make_file("llama", files=files | own).path) as model:
        assert (type(model.tokenizer).__name__ == "LeanTokenizer") == (not extra)
        assert model.tokenizer.chat_template == expected


def test_a_template_alone_is_no_tokenizer(make_file: MakeFile) -> None:
    files = old("O")
    with (
        cvxq.load(make_file("llama", files=files, with_record=True).path) as model,
        pytest.raises(cvxq.CvxqError, match="has no tokenizer"),
    ):
        model.encode("a")

"""Tokenizers without transformers, from tokenizer.json.

`read_tokenizer` takes a tokenizer only if its files say everything that transformers would add by
itself: special tokens that are in the vocabulary, a beginning and end that agree with the flags of
tokenizer_config.json.  It returns None for any other, which transformers reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cvxq_format import Reader

from cvxq.parts import json_part
from cvxq.templates import chat_template

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Files besides which a tokenizer.json is not the whole truth.
_STRANGERS = ("tekken.json", "tiktoken.model", "added_tokens.json")


class Codec(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the tokens of `text`, special tokens written in it included."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of the tokens."""

    def token_id(self, token: str) -> int | None:
        """Return the id of a special token, None if it is not one."""


class LeanTokenizer:
    """A codec, special tokens and a chat template, called as transformers' tokenizers are."""

    def __init__(
        self, codec: Codec, special_tokens: Mapping[str, str], chat_template: str | None
    ) -> None:
        """Join the parts; special_tokens: what templates may know as `bos_token` and so on."""
        self.codec = codec
        self.special_tokens_map = dict(special_tokens)
        self.chat_template = chat_template
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")

    def _id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.codec.token_id(token)

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        """Return {"input_ids": the tokens of `text`}; there is nothing to be verbose about."""
        return {"input_ids": self.codec.encode(text, add_special_tokens)}

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Return the text of the tokens; spaces are never cleaned up."""
        if clean_up_tokenization_spaces:
            raise NotImplementedError("spaces are not cleaned up")
        return self.codec.decode(token_ids, skip_special_tokens)


def read_tokenizer(reader: Reader) -> LeanTokenizer | None:
    """Build the tokenizer of an open file, or return None where only transformers can."""
    config = {
        **json_part(reader, "special_tokens_map.json"),
        **json_part(reader, "tokenizer_config.json"),
    }
    named = _special_tokens(config)
    if named is None or "auto_map" in config:
        return None
    if any(name in reader.files for name in _STRANGERS):
        return None
    if "tokenizer.json" not in reader.files:
        return None
    from cvxq.lean.fast_codec import read_fast_codec

    codec = read_fast_codec(reader.file("tokenizer.json"), config, named)
    return None if codec is None else LeanTokenizer(codec, named, chat_template(reader))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the named special tokens, or None where there are others that a template may know."""
    if isinstance(config.get("extra_special_tokens"), Mapping):
        return None
    named = {}
    for name in _NAMED:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            named[name] = value
        elif value is not None:
            return None
    return named

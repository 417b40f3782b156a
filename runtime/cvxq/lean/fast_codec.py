"""tokenizer.json through the `tokenizers` library, which transformers' fast tokenizers wrap.

The library raises `Exception` itself, and where its Rust code panics something that is not even an
`Exception`; here both become errors of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

from cvxq.errors import ArgumentError, InconsistentFileError
from cvxq.lean.growth import MOST_GROWTH, growth

_EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")


class FastCodec:
    """A tokenizer.json; see `cvxq.lean.tokenizer.Codec`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read whole texts: no cutting, no padding."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the tokens of `text`, special tokens written in it included.

        Raises ArgumentError for a text that is none, InconsistentFileError where the file's
        tokenizer fails.
        """
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ArgumentError("the text has bytes that are not UTF-8; leave them out of it")
        with _told("on this text"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of the tokens."""
        with _told("on the model's tokens"):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, None if it is not one."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Raise InconsistentFileError for whatever the library raises."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        told = str(error) or type(error).__name__
        raise InconsistentFileError(f"the file's tokenizer fails {where}: {told:.200}") from error


def check_growth(tokenizer: Tokenizer) -> None:
    """Raise InconsistentFileError for a tokenizer that may make too much of a text."""
    found = growth(tokenizer)
    if found > MOST_GROWTH:
        raise InconsistentFileError(
            f"the file's tokenizer can make {found:.3g} bytes of one, allowed {MOST_GROWTH}; "
            "do not use the file"
        )


def read_fast_codec(
    blob: bytes, config: Mapping[str, Any], named: Mapping[str, str]
) -> FastCodec | None:
    """Read a tokenizer.json, or return None where the config has transformers change it."""
    try:
        with _told("to load"):
            tokenizer = Tokenizer.from_str(blob.decode("utf-8"))
    except (UnicodeDecodeError, InconsistentFileError):  # transformers will say what is wrong
        return None
    check_growth(tokenizer)
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    if any(token not in added or not added[token].special for token in named.values()):
        return None
    listed = _listed_tokens(config)
    if listed is None:
        return None
    for entry in listed:
        token = added.get(entry["content"])
        if token is None or any(
            getattr(token, flag) != entry.get(flag, getattr(token, flag))
            for flag in ("lstrip", "rstrip", "normalized", "single_word", "special")
        ):
            return None
    codec = FastCodec(tokenizer)
    return codec if _ends_agree(codec, config, named) else None


def _listed_tokens(config: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tokens that the config lists, those without a name with all their flags.

    None where it lists something else, which transformers may make sense of.
    """
    decoder = config.get("added_tokens_decoder") or {}
    lists = [config.get(name) or [] for name in _EXTRA_TOKENS]
    if not isinstance(decoder, dict) or not all(isinstance(names, list) for names in lists):
        return None
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    texts = [{"content": n} if isinstance(n, str) else n for names in lists for n in names]
    entries = [*decoder.values(), *texts]
    if not all(isinstance(e, dict) and isinstance(e.get("content"), str) for e in entries):
        return None
    return [*decoder.values(), *({**plain, "special": True, **entry} for entry in texts)]


def _ends_agree(codec: FastCodec, config: Mapping[str, Any], named: Mapping[str, str]) -> bool:
    """Whether the tokenizer adds what the flags say; without flags it does as it likes."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return config.get("add_prefix_space") is None
    expected = []
    for name in ("bos", "eos"):
        if config.get(f"add_{name}_token") and f"{name}_token" in named:
            expected.append(codec.token_id(named[f"{name}_token"]))
    return codec.encode("", True) == expected

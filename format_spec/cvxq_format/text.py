"""Texts on their way to a tokenizer, the same for converting and for running a model."""

from __future__ import annotations

from typing import Any


def decode_text(data: bytes) -> str:
    r"""Return the UTF-8 text of `data`, without a byte order mark, every line break as "\n".

    Windows' "\r\n" and a lone "\r" are line breaks, so a file gives the same tokens wherever it
    was written.  Raises UnicodeDecodeError for what is not UTF-8.
    """
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def start_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before every text by default: BOS, or none."""
    alone: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    framed: list[int] = list(tokenizer("a")["input_ids"])
    for place in range(len(framed) - len(alone) + 1):
        if framed[place : place + len(alone)] == alone:
            return framed[:place]
    return []

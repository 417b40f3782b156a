"""What of a text file reaches the tokenizer."""

from __future__ import annotations

import pytest
from cvxq_format.text import decode_text, start_tokens


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"\xef\xbb\xbf", ""),
        (b"\xef\xbb\xbfab", "ab"),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),  # only at the start is it a mark
        (b"a\r\nb\rc\n\r\n", "a\nb\nc\n\n"),
        ("é\u2028\x85".encode(), "é\u2028\x85"),
    ],
)
def test_marks_and_line_breaks(data: bytes, text: str) -> None:
    assert decode_text(data) == text


def test_a_wrong_byte_is_told_by_its_place() -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        decode_text(b"ab\xff")
    assert caught.value.start == 2


@pytest.mark.parametrize(
    ("before", "after"), [([], []), ([1], []), ([1], [2]), ([], [2]), ([7, 8], [])]
)
def test_start_tokens_are_those_before_the_text(before: list[int], after: list[int]) -> None:
    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [*before, *ids, *after] if add_special_tokens else ids}

    assert start_tokens(tokenizer) == before

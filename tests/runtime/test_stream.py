"""Text that streams is the text of all tokens, in whole characters, cut at stop strings."""

from __future__ import annotations

import itertools

import pytest
from cvxq.stream import StopStrings, TextStream
from hypothesis import given
from hypothesis import strategies as st


class ByteTokenizer:
    """One token per byte of UTF-8; the hardest case for whole characters."""

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return bytes(token_ids).decode("utf-8", errors="replace")


class FallbackTokenizer(ByteTokenizer):
    """As byte fallback does: each byte of a run of non-ASCII bytes with a fault becomes U+FFFD."""

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        text = ""
        for _, run in itertools.groupby(token_ids, key=lambda token: token < 128):
            data = bytes(run)
            try:
                text += data.decode("utf-8")
            except UnicodeDecodeError:
                text += "\ufffd" * len(data)
        return text


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=80)
TOKENIZERS = [ByteTokenizer(), FallbackTokenizer()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(text=TEXTS)
def test_pieces_are_whole_and_join_to_the_text(tokenizer: ByteTokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@given(text=TEXTS.filter(bool))
def test_a_character_comes_as_soon_as_it_is_complete(text: str) -> None:
    stream, shown = TextStream(ByteTokenizer()), ""
    for character in text:
        shown += "".join(stream.push(byte) for byte in character.encode())
        assert shown.endswith(character)


def test_the_prompt_is_not_repeated() -> None:
    stream = TextStream(ByteTokenizer(), "Grüße, ".encode())
    assert [stream.push(byte) for byte in "ö!".encode()] == ["", "ö", "!"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(prompt=TEXTS, text=TEXTS)
def test_any_prompt_is_not_repeated(tokenizer: ByteTokenizer, prompt: str, text: str) -> None:
    stream = TextStream(tokenizer, prompt.encode())
    assert "".join(stream.push(byte) for byte in text.encode()) == text


def test_a_character_begun_in_the_prompt_is_completed() -> None:
    first, second = "ö".encode()
    stream = TextStream(ByteTokenizer(), [*b"sch", first])
    assert stream.push(second) == "ö"


def test_an_incomplete_character_at_the_end_is_left_out() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in "a日".encode()[:-1]] == ["a", "", ""]


def test_invalid_bytes_inside_show_as_unknown() -> None:
    stream = TextStream(ByteTokenizer())
    assert "".join(stream.push(byte) for byte in b"a\xff\xffb") == "a\ufffd\ufffdb"


def test_endless_invalid_bytes_are_not_held_forever() -> None:
    stream = TextStream(ByteTokenizer())
    shown = "".join(stream.push(0xFF) for _ in range(1000))
    assert len(shown) > 800


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(st.text("abc", max_size=5), max_size=8), stops=STOPS)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    watch = StopStrings(stops)
    shown = "".join(watch.push(piece) for piece in pieces) + watch.finish()
    assert shown == expected
    assert (watch.found is not None) == bool(ends)


def test_only_a_possible_beginning_is_held_back() -> None:
    watch = StopStrings(["\nUser:"])
    assert watch.push("Hi\n") == "Hi"
    assert watch.push("Use") == ""
    assert watch.push(" it") == "\nUse it"
    assert watch.push(".\nUser: next") == "."
    assert watch.found == "\nUser:"
    assert watch.push("more") == watch.finish() == ""

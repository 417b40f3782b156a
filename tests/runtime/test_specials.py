"""Special tokens in stop strings, and those that a text shall show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from cvxq.generate import Generation, generate_text
from cvxq.sample import SamplingSettings
from cvxq.session import Logits, Session
from cvxq.specials import hidden_tokens

Say = Callable[..., Generation]


class Recitation(Session):
    """A session that draws the tokens it was given."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(None)
        self.tokens = tokens

    def draw(self, ids: Sequence[int], settings: SamplingSettings, _: object) -> Iterator[int]:
        return iter(self.tokens)

    def rewind(self, length: int) -> None:
        raise AssertionError

    def _read(self, ids: Sequence[int]) -> Logits:
        raise AssertionError


@pytest.fixture
def say(character_tokenizer: Callable[[str | None], Any]) -> Say:
    """Return a function that lets a model say a text: say("…<|end|>", stop=…, ends=…, kept=…)."""
    tokenizer = character_tokenizer(None)

    def generate(
        text: str, *, stop: tuple[str, ...] = (), ends: Sequence[str] = (), kept: Sequence[str] = ()
    ) -> Generation:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        end_ids = {tokenizer.codec.token_id(end) for end in ends}
        pieces: list[str] = []
        settings = SamplingSettings(stop=stop)
        result = generate_text(
            Recitation(ids), tokenizer, [1], settings, end_ids, pieces.append, kept
        )
        assert "".join(pieces) == result.text
        return result

    return generate


SAID = "Hey!<|end|>\n<|start|>user says <b> [END]more"


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("<|end|>", "Hey!"),
        ("<|start|>", "Hey!\n"),
        ("!<|end|>\n", "Hey"),
        ("\n<|start|>user", "Hey!"),
        ("<|end|>\n<|start|>user says", "Hey!"),
        ("[END]more", "Hey!\nuser says <b> "),
        ("<b>", "Hey!\nuser says "),
    ],
)
def test_stop_strings_may_have_special_tokens(say: Say, stop: str, shown: str) -> None:
    result = say(SAID, stop=("never", stop))
    assert (result.text, result.finish) == (shown, "stop")


def test_a_stop_string_is_not_found_inside_what_nobody_sees(say: Say) -> None:
    assert say(SAID, stop=("<",)).text == "Hey!\nuser says "
    assert say(SAID, stop=("END", "start", "|>")).finish == "context"


def test_a_stop_string_spelled_in_plain_letters_counts_too(
    say: Say, character_tokenizer: Callable[[str | None], Any]
) -> None:
    tokenizer = character_tokenizer(None)
    letters = [tokenizer.codec.token_id(letter) for letter in "ab<|end|>c"]
    settings = SamplingSettings(stop=("<|end|>",))
    result = generate_text(Recitation(letters), tokenizer, [1], settings)
    assert (result.text, result.finish) == ("ab", "stop")


def test_a_stop_string_goes_before_the_end_that_it_is(say: Say) -> None:
    assert say("Hey!<|end|>", ends=["<|end|>"]).finish == "end"
    assert say("Hey!<|end|>", ends=["<|end|>"], stop=("<|end|>",)).finish == "stop"
    assert say("Hey!<|end|>", ends=["<|end|>"], stop=("y!<|end|>",)).text == "He"
    # what was held back for a stop string is shown when it does not come
    assert say("Hey!<|end|>", ends=["<|end|>"], stop=("!<|end|>\n",)).text == "Hey!"


def test_special_tokens_are_shown_where_asked_for(say: Say) -> None:
    assert say(SAID).text == "Hey!\nuser says <b> more"
    assert say(SAID, kept=["[END]", "user"]).text == "Hey!\nuser says <b> [END]more"
    assert say(SAID, kept=["[END]"], stop=("<|start|>user",)).text == "Hey!\n"
    assert say(SAID, kept=["[END]"], stop=("END",)).text == "Hey!\nuser says <b> [END]more"


def test_only_what_decoding_leaves_out_is_hidden(
    character_tokenizer: Callable[[str | None], Any],
) -> None:
    tokenizer = character_tokenizer(None)
    found = hidden_tokens(tokenizer, "a <b> [END]<|end|>[END]")
    assert list(found.values()) == ["[END]", "<|end|>"]

"""Thinking is parted from the answer, however the text is cut into pieces."""

from __future__ import annotations

import pytest
from cvxq.thinking import KNOWN_MARKS, USUAL_MARKS, Marks, Reply, opened_marks
from hypothesis import given
from hypothesis import strategies as st

MARKS = (USUAL_MARKS, Marks("<thinking>", "</thinking>"), Marks("[T]", "[/T]"))


def parted(pieces: list[str], opened: Marks | None = None) -> tuple[str, str, Reply]:
    """Return what was shown as thinking, what as the answer, and the reply."""
    reply = Reply(MARKS, opened)
    shown = [part for piece in pieces for part in reply.push(piece)] + reply.finish()
    texts = [
        "".join(text for text, is_thought in shown if is_thought is kind) for kind in (True, False)
    ]
    return texts[0], texts[1], reply


REPLIES = [
    ("<think>\nwell\n</think>\n\nYes.", "<think>\nwell\n</think>\n\n", "Yes."),
    ("\n<thinking>a</think>b</thinking>Yes. ", "<thinking>a</think>b</thinking>", "Yes. "),
    ("[T][/T]Yes", "[T][/T]", "Yes"),
    ("  Yes <think>no</think>", "", "Yes <think>no</think>"),
    ("<thin air>", "", "<thin air>"),
    ("<think>for ever </thi", "<think>for ever </thi", ""),
    ("<thi", "", "<thi"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "thought", "answer"), REPLIES)
@given(data=st.data())
def test_pieces_do_not_matter(text: str, thought: str, answer: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parted(pieces)[:2] == (thought, answer)


def test_what_was_thought_and_answered() -> None:
    *_, reply = parted(["<think>\nwell\n</think>\n\nYes.\n"])
    assert (reply.thought, reply.answer, reply.is_thinking) == ("well", "Yes.", False)
    *_, reply = parted(["<think> well"])
    assert (reply.thought, reply.answer, reply.is_thinking) == ("well", "", True)
    *_, reply = parted(["Yes."])
    assert (reply.thought, reply.answer, reply.is_thinking) == ("", "Yes.", False)


def test_the_answer_begins_to_show_at_once() -> None:
    reply = Reply(MARKS)
    assert reply.push(" <") == []
    assert reply.push("b") == [("<b", False)]
    assert reply.push(">") == [(">", False)]


def test_thinking_that_the_prompt_has_begun() -> None:
    assert opened_marks("assistant\n<think>\n", MARKS) == USUAL_MARKS
    assert opened_marks("assistant\n<think>\n\n</think>\n\n", MARKS) is None
    thought, answer, reply = parted(["well</th", "ink>\nYes."], USUAL_MARKS)
    assert (thought, answer) == ("<think>well</think>\n", "Yes.")
    assert reply.thought == "well"


def test_no_opening_mark_hides_another() -> None:
    """The first of the known marks that fits is taken, so none may begin with an earlier one."""
    openings = [pair.opening for pair in KNOWN_MARKS]
    for index, opening in enumerate(openings):
        assert not any(opening.startswith(earlier) for earlier in openings[:index])

"""Every message that a user can meet: one line, what was found, and what is allowed or next.

The texts are read from the sources, with {} for what they fill in, so that none is forgotten.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("format_spec/cvxq_format", "runtime/cvxq", "converter/cvxq_converter")
PROPER_NAMES = {"PyTorch"}
# Classes whose text ends up on the command line or in an answer of the server. Reasons why another
# path is taken (NotLeanError, NotDescribedError) follow what is done about them.
SHOWN = re.compile(
    r"(Argument|Context|Chat|Template\w*|MissingPart|InconsistentFile|UnsupportedModel|"
    r"Conversion|Rate|Format|NotCvxq|Unsupported|Truncated|Corrupt)Error"
    r"|FileProblem|VerificationFailed|click\.(UsageError|BadParameter)|ApiError"
)
# A word of what is allowed, or of what to do.
HELPS = re.compile(
    r"allowed|expected|;|\bneed|\bmust\b|\bonly\b|\btakes?\b|\bgive\b|\buse\b|\binstall\b"
    r"|\bupdate\b|\bno JSON object|\bexactly\b|\bcannot\b"
)
TOLD = re.compile(r"(: |, and |\()\{\}\)?$")  # somebody else's words, who knows more
# What the reader says of a file's part when it puts its place in front.
WITH_A_PLACE = {"files.py", "codebook.py", "template_program.py"}
SAYS_NOTHING = re.compile(r"\b(unexpected|invalid|bad|illegal|please|sorry|oops|failed to)\b", re.I)


class Message(NamedTuple):
    """A text with {} for values, and where it is raised."""

    place: str
    text: str


def text_of(node: ast.expr) -> str | None:
    """Return the text of a literal, None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return None


def messages() -> list[Message]:
    """Every literal text of an error that is shown."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name in WITH_A_PLACE:
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                    continue
                if not SHOWN.fullmatch(ast.unparse(node.exc.func)):
                    continue
                for text in map(text_of, node.exc.args[:2]):
                    if text is not None and text.strip("{}"):
                        found.append(Message(f"{path.relative_to(ROOT)}:{node.lineno}", text))
    return found


def test_all_messages_are_found() -> None:
    assert len(messages()) > 200


@pytest.mark.parametrize("message", messages(), ids=lambda message: message.place)
def test_the_shape_of_a_message(message: Message) -> None:
    text = message.text
    assert text == " ".join(text.split()), "one line, and no space to spare"
    assert not text.endswith((".", "!", "?")), "a line, no sentence"
    assert not SAYS_NOTHING.search(text)
    assert len(text) <= 300
    first = text.split()[0]
    assert not text[:1].isupper() or first.isupper() or first in PROPER_NAMES, (
        "it begins with where"
    )
    assert HELPS.search(text) or TOLD.search(text), "what is allowed, or what to do"

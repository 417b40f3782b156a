"""Every message that a user can meet: one line, what was found, and what is allowed or next.

The texts are read from the sources, with {} for what they fill in, so that none is forgotten.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("format_spec/cvxq_format", "kernels/cvxq_kernels"),
    *("runtime/cvxq", "converter/cvxq_converter"),
)
PROPER_NAMES = {"PyTorch", "README.md", "Triton's"}
# Classes whose text ends up on the command line or in an answer of the server.
SHOWN = re.compile(
    r"(Argument|Context|Chat|Template\w*|MissingPart|MissingExtra|Hub|InconsistentFile|"
    r"UnsupportedModel|Conversion|CutShort|Rate|Format|NotCvxq|Unsupported|Truncated|Corrupt|"
    r"Memory|Security)Error"
    r"|FileProblem|VerificationFailed|click\.(UsageError|BadParameter)|ApiError|self\.fail"
)
# What follows another text: why something slower is done, or what is wrong with a part of a file,
# whose name and place whoever reads the file puts in front.
REASONS = re.compile(r"(NotLean|NotDescribed|LostRank|UnsupportedWeight)Error")
PARTS = re.compile(r"ValueError")
WITH_A_PLACE = {"codebook.py", "files.py", "template_program.py"}
SAYING = {"click.echo", "announce", "say", "warnings.warn", "self.say", "self._say"}
# A word of what is allowed, or of what to do.
HELPS = re.compile(
    r"allowed|expected|;|\bneed|\bmust\b|\bonly\b|\btakes?\b|\bgive\b|\buse\b|\binstall\b"
    r"|\bupdate\b|\bno JSON object|\bexactly\b|\bcannot\b"
)
TOLD = re.compile(r"(: |, and |\()\{\}\)?$")  # somebody else's words, who knows more
SAYS_NOTHING = re.compile(r"\b(unexpected|invalid|bad|illegal|please|sorry|oops|failed to)\b", re.I)
# Functions whose texts errors are raised with, and errors raised with that of another one.
MAKERS = {"no_positions", "reason", "_experts_message"}
MADE_ELSEWHERE = re.compile(
    r".*\((no_positions|_experts_message)\(.*\)\)"
    r"|(FileProblem|InconsistentFileError|UnsupportedModelError|click\.UsageError|self\.fail)"
    r"\((found|refused|error|str\(error\))\)"
)


class Message(NamedTuple):
    """A text with {} for values, where it is, and of what kind."""

    place: str
    text: str
    kind: str


def text_of(node: ast.expr) -> str | None:
    """Return the text of a literal, None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or "{}") + (text_of(node.right) or "{}")
    return None


@cache
def trees() -> dict[Path, ast.Module]:
    """What the packages' files say."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path: ast.parse(path.read_text("utf-8")) for path in paths}


def calls() -> Iterator[tuple[Path, ast.Call, bool]]:
    """Every call of the packages, and whether what it returns is raised."""
    for path, tree in trees().items():
        raised = {id(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield path, node, id(node) in raised


def kind_of(path: Path, call: ast.Call, is_raised: bool) -> str | None:
    """What a text of this call is to a user: an error, a part or a reason of one, a notice."""
    name = ast.unparse(call.func)
    if name in SAYING:
        is_error = name != "click.echo" or any(
            word.arg == "err" and ast.unparse(word.value) == "True" for word in call.keywords
        )
        return "notice" if is_error else None
    if not is_raised and name != "self.fail":
        return None
    is_part = path.name in WITH_A_PLACE or (PARTS.fullmatch(name) and "cvxq_format" in path.parts)
    if is_part or REASONS.fullmatch(name):
        return "part"
    asked = path.name == "schemas.py" and PARTS.fullmatch(name)  # becomes an ApiError
    return "error" if asked or SHOWN.fullmatch(name) else None


def messages() -> list[Message]:
    """Every literal text that is shown."""
    shown = [(*call[:2], kind_of(*call)) for call in calls()]
    found = [
        (path, argument, kind) for path, call, kind in shown if kind for argument in call.args[:2]
    ]
    found += [(path, value, "error") for path, value in made_texts()]
    texts = [
        Message(f"{path.relative_to(ROOT)}:{node.lineno}", text_of(node) or "", kind)
        for path, node, kind in found
    ]
    return [message for message in texts if re.search("[a-z]{2}", message.text)]


def made_texts() -> Iterator[tuple[Path, ast.expr]]:
    """What the makers of texts return."""
    for path, tree in trees().items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name in MAKERS:
                for node in ast.walk(function):
                    if isinstance(node, ast.Return) and node.value is not None:
                        yield path, node.value


def test_all_messages_are_found() -> None:
    kinds = [message.kind for message in messages()]
    assert kinds.count("error") > 240
    assert kinds.count("part") > 60
    assert kinds.count("notice") > 10


def test_no_error_is_raised_with_a_text_that_is_not_here() -> None:
    errors = [call for path, call, raised in calls() if kind_of(path, call, raised) == "error"]
    without = [call for call in errors if not any(map(text_of, call.args[:2]))]
    assert len(without) < len(errors) / 10
    assert not [text for text in map(ast.unparse, without) if not MADE_ELSEWHERE.fullmatch(text)]


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
    if message.kind == "error":
        assert HELPS.search(text) or TOLD.search(text), "what is allowed, or what to do"

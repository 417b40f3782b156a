"""The chat template that a file carries, wherever the model's author kept it.

Newer sources have `chat_template.jinja`, further templates by name in `additional_chat_templates/`;
older ones a string, or a list of named templates, in `tokenizer_config.json`; some, made for
processors of images, only `chat_template.json`.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from cvxq_format import Reader

from cvxq.errors import InconsistentFileError
from cvxq.parts import json_part

_FILE = "chat_template.jinja"
_DEFAULT = "default"


def chat_template(reader: Reader) -> str | None:
    """Return the template called `default`, else the first; None if the file carries none.

    Of several of one name, that of a .jinja file counts, then that of the tokenizer's settings.
    Raises InconsistentFileError for templates that are no text.
    """
    found: dict[str, str] = {}
    for name in ("chat_template.json", "tokenizer_config.json"):
        found |= _named(json_part(reader, name).get("chat_template"), f"{reader.path}: {name}")
    for name in sorted(reader.files):
        if name.endswith(".jinja"):
            path = PurePosixPath(name)
            found[_DEFAULT if name == _FILE else path.stem] = _text(reader, name)
    return found.get(_DEFAULT) or next(iter(found.values()), None)


def _named(value: Any, where: str) -> dict[str, str]:
    """Return the templates of a JSON file by name: one string, a list of pairs, or none."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {_DEFAULT: value}
    try:
        named = {entry["name"]: entry["template"] for entry in value}
    except (KeyError, TypeError):
        named = {"": None}
    if not all(isinstance(text, str) for text in (*named, *named.values())):
        raise InconsistentFileError(
            f"{where} of the file: chat_template is neither a text nor a list of objects with a "
            "name and a template; mend it and convert the model again"
        )
    return named


def _text(reader: Reader, name: str) -> str:
    try:
        return reader.file(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InconsistentFileError(
            f"{reader.path}: {name} of the file: byte {error.start} is not UTF-8; "
            "save it as UTF-8 in the source, and convert the model again"
        ) from None

"""The JSON files that a `.cvxq` file carries, without transformers."""

from __future__ import annotations

import json
from typing import Any

from cvxq_format import Reader

from cvxq.errors import InconsistentFileError, MissingPartError


def needed_part(reader: Reader, name: str) -> bytes:
    """Return the carried file `name`; MissingPartError when there is none."""
    if name not in reader.files:
        raise MissingPartError(f"the file has no {name}, without which it cannot be run")
    return reader.file(name)


def json_part(reader: Reader, name: str) -> dict[str, Any]:
    """Return the carried JSON object `name`, empty when the file has none.

    Raises InconsistentFileError when it is not a JSON object.
    """
    if name not in reader.files:
        return {}
    return json_object(reader.file(name), f"{reader.path}: {name} of the file")


def json_object(blob: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object, called `what` in the InconsistentFileError for anything else."""
    try:
        value = json.loads(blob)
    except (ValueError, RecursionError) as error:
        raise InconsistentFileError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InconsistentFileError(f"{what} is not a JSON object; convert the model again")
    return value


def stated_end_ids(reader: Reader) -> frozenset[int]:
    """Tokens that end a text by the generation config or the config; empty if they do not say.

    Raises InconsistentFileError for anything but a token, a list of tokens, or null.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ids = json_part(reader, name).get("eos_token_id")
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(item) is int for item in listed):
            raise InconsistentFileError(
                f"{reader.path}: {name} of the file: eos_token_id is {ids!r:.60}, allowed: "
                "a token's number, a list of them, or null"
            )
        found.update(listed)
    return frozenset(found)

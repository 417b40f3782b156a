"""JSON without surprises: what a container may hold, the rest refused early and in one line.

Standard parsers accept duplicate keys, NaN, numbers of any length and nesting until the stack
ends. Here each of them is a `CorruptError`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from typing import Any, NoReturn

from cvxq_format.errors import CorruptError
from cvxq_format.limits import MAX_NESTING

# A string that never ends matches too: trying again at each of its quotes would take forever.
_STRING_OR_BRACKET = re.compile(r'"[^"]*(?:"|\Z)|([\[{])|([\]}])')
_MAX_DIGITS = 20


def parse(data: bytes, what: str = "header", fractions: bool = False) -> Any:
    """Parse strict JSON; raises CorruptError, naming `what`, for anything unusual.

    fractions: numbers may have a fraction or an exponent.
    """
    refuse = partial(_no_number, what, "finite numbers" if fractions else "integers only")
    try:
        text = data.decode("utf-8")
        _check_nesting(text, what)
        return json.loads(
            text,
            object_pairs_hook=partial(_unique, what),
            parse_int=partial(_integer, what),
            parse_float=float if fractions else refuse,
            parse_constant=refuse,
        )
    except CorruptError:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{what} is not valid JSON: {error}; the file is corrupt") from error


def canonical(value: object) -> bytes:
    """Return the one encoding that writers use: sorted keys, no spaces, ASCII only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def _check_nesting(text: str, what: str) -> None:
    depth = 0
    bare = text.replace("\\\\", "").replace('\\"', "")  # escaped backslashes, then escaped quotes
    for match in _STRING_OR_BRACKET.finditer(bare):
        depth += (match[1] is not None) - (match[2] is not None)
        if depth > MAX_NESTING:
            raise CorruptError(
                f"{what} nests deeper than {MAX_NESTING} levels; the file is corrupt"
            )


def _unique(what: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise CorruptError(f"{what} key {twice[:80]!r} appears twice; the file is corrupt")
    return result


def _integer(what: str, text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise CorruptError(f"{what} number of {len(text)} digits, allowed {_MAX_DIGITS}")
    return int(text)


def _no_number(what: str, allowed: str, text: str) -> NoReturn:
    raise CorruptError(f"{what} number {text[:40]}, allowed {allowed}; the file is corrupt")


class Fields:
    """One JSON object, taken apart key by key; whatever stays behind is an error.

    where: what the object is, for messages; lenient: ignore unknown keys (newer minor version).
    """

    def __init__(self, where: str, value: Any, lenient: bool) -> None:
        self.where = where
        self.lenient = lenient
        if not isinstance(value, dict):
            raise CorruptError(
                f"{where} is {_brief(value)}, allowed an object; the file is corrupt"
            )
        self._rest = dict(value)

    def _take(self, key: str) -> Any:
        if key not in self._rest:
            raise CorruptError(f"{self.where} lacks key {key!r}; the file is corrupt")
        return self._rest.pop(key)

    def _refuse(self, key: str, value: Any, allowed: str) -> NoReturn:
        raise CorruptError(
            f"{self.where}, {key!r}: {_brief(value)}, allowed {allowed}; the file is corrupt"
        )

    def has(self, key: str) -> bool:
        """Return whether a key that may be absent is there, not taken yet."""
        return key in self._rest

    def integer(self, key: str, low: int, high: int) -> int:
        value = self._take(key)
        if type(value) is not int or not low <= value <= high:
            self._refuse(key, value, f"an integer from {low} to {high}")
        return value

    def boolean(self, key: str) -> bool:
        value = self._take(key)
        if not isinstance(value, bool):
            self._refuse(key, value, "true or false")
        return value

    def true(self, key: str) -> bool:
        """Take a key that is only ever true."""
        value = self._take(key)
        if value is not True:
            self._refuse(key, value, "true")
        return True

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str):
            self._refuse(key, value, "a string")
        return value

    def choice(self, key: str, options: tuple[str, ...]) -> str:
        value = self._take(key)
        if value not in options:
            self._refuse(key, value, " or ".join(options))
        return str(value)

    def items(self, key: str) -> list[Any]:
        value = self._take(key)
        if not isinstance(value, list):
            self._refuse(key, value, "a list")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.items(key)
        if not all(isinstance(item, str) for item in value):
            self._refuse(key, value, "a list of strings")
        return value

    def mapping(self, key: str) -> dict[str, str]:
        value = self._take(key)
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            self._refuse(key, value, "an object of strings")
        return value

    def finish(self) -> None:
        """Raise CorruptError if a key was not taken, unless unknown keys are to be ignored."""
        if self._rest and not self.lenient:
            key = min(self._rest)
            raise CorruptError(f"{self.where} has unknown key {key[:80]!r}; the file is corrupt")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

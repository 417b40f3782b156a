"""Checking a whole container: every checksum, every padding byte, every invariant."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from cvxq_format.errors import FormatError
from cvxq_format.reader import Reader


@dataclass(frozen=True)
class Problem:
    """One thing wrong; kind: container, codebook, tensor, file or padding; name: whose."""

    kind: str
    name: str
    message: str


def verify(path: str | os.PathLike[str]) -> list[Problem]:
    """Return everything wrong with a container, nothing if it is sound.

    A file that cannot be opened gives one problem of kind "container". Raises OSError.
    """
    try:
        reader = Reader(path)
    except FormatError as error:
        return [Problem("container", str(path), str(error))]
    problems: list[Problem] = []

    def attempt(kind: str, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except FormatError as error:
            problems.append(Problem(kind, name, str(error)))

    with reader:
        for section in reader.sections():
            name = section.name
            if section.kind == "codebook":
                attempt("codebook", name, lambda i=int(name): reader.codebook(i))  # type: ignore[misc]
            elif section.kind == "tensor":
                attempt("tensor", name, lambda n=name: reader.read(n))  # type: ignore[misc]
            elif section.kind == "file":
                attempt("file", name, lambda n=name: reader.file(n))  # type: ignore[misc]
            padding = reader.padding(section)
            if any(padding):
                end = section.offset + section.size
                text = f"padding at byte {end:#x} after {section.kind} {name!r} is not zero"
                problems.append(Problem("padding", name, f"{text}; the file is corrupt"))
    return problems

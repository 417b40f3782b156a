"""What the runtime can refuse, and the exit code that the command line gives each.

    CvxqError                  1  base of all below
    ├── ArgumentError          2  a setting or prompt that cannot be used
    │   ├── ContextError       2  more tokens than the model's context holds
    │   └── ChatError          2  turns that do not fit the context or the chat template
    ├── MissingPartError       3  the file has no tokenizer (or other part) that is needed
    ├── HubError               3  the hub does not give the file, or does not take it
    ├── InconsistentFileError  4  sound checksums, but the parts contradict each other, or a
    │                             configuration holds a value that cannot be
    └── UnsupportedModelError  5  an architecture or option that this installation cannot run
        └── MissingExtraError  5  a package is missing that an extra of cvxq brings

Errors of the container itself (not a .cvxq file, corrupt, truncated, unknown feature) are those
of `cvxq_format` and pass through unchanged.
"""

from __future__ import annotations

import sys


class CvxqError(Exception):
    """Base of the runtime's errors; the text is one line for the user."""

    exit_code = 1


class ArgumentError(CvxqError, ValueError):
    """A setting or prompt that cannot be used."""

    exit_code = 2


class ContextError(ArgumentError):
    """More tokens than the model's context holds."""


class ChatError(ArgumentError):
    """Turns that cannot be rendered or do not fit the context."""


def no_positions(context: int, positions: int) -> str:
    """Say that a context is longer than the model's table of positions."""
    return (
        f"context is {context} tokens, but the model has learned positions for {positions} only; "
        "give no more"
    )


class MissingPartError(CvxqError):
    """The file lacks a part that this use of it needs."""

    exit_code = 3


class HubError(CvxqError):
    """The hub does not give a file, or does not take it."""

    exit_code = 3


class InconsistentFileError(CvxqError):
    """The file's checksums hold, but its parts contradict each other or a value cannot be."""

    exit_code = 4


class UnsupportedModelError(CvxqError):
    """An architecture or option that this installation cannot run."""

    exit_code = 5


class MissingExtraError(UnsupportedModelError):
    """A package is missing that an extra of cvxq brings."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is Python's or torch's way to say that memory ran out."""
    torch = sys.modules.get("torch")
    return isinstance(error, (MemoryError, getattr(torch, "OutOfMemoryError", ()))) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )

"""Every exception as one line and one exit code.

The codes are those of the group's help: 1 unexpected, 2 usage, 3 file missing or unreadable,
4 corrupt or truncated, 5 unsupported, 6 checkpoint refused, conversion failed or does not fit,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from cvxq.errors import is_out_of_memory

UNEXPECTED, USAGE, FILE, CORRUPT, UNSUPPORTED, CONVERSION, INTERRUPTED = 1, 2, 3, 4, 5, 6, 130

# Looked up among the modules that are loaded already: an error of a module that nobody imported
# cannot have been raised, and importing it here would cost what the lazy commands saved.
_CODES = {
    ("cvxq_format", "NotCvxqError"): FILE,
    ("cvxq_format", "UnsupportedError"): UNSUPPORTED,
    ("cvxq_format", "FormatError"): CORRUPT,
    ("cvxq_converter.errors", "NoSuchFileError"): FILE,
    ("cvxq_converter.errors", "ConversionError"): CONVERSION,
}


_LONGEST_LINE = 1000


class FileProblem(click.ClickException):
    """A path on the command line that cannot be used as asked."""

    exit_code = FILE


def exit_code(error: BaseException) -> int:
    """Return the documented exit code of `error`."""
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    for (module_name, class_name), code in _CODES.items():
        if isinstance(error, getattr(sys.modules.get(module_name), class_name, ())):
            return code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return INTERRUPTED
    if isinstance(error, OSError):
        return FILE
    return CONVERSION if is_out_of_memory(error) else UNEXPECTED


def describe(error: BaseException) -> str:
    """Return one line, without a line break, that says what is wrong and what to do."""
    code = exit_code(error)
    if isinstance(error, click.ClickException):
        text = error.format_message()
        if isinstance(error, click.UsageError) and error.ctx is not None:
            text += f" (see {error.ctx.command_path} --help)"
    elif code == INTERRUPTED:
        text = "interrupted"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{os.fspath(error.filename)}: {error.strerror}"
    elif is_out_of_memory(error):
        text = f"not enough memory: {str(error) or 'an allocation failed'}"
    elif code == UNEXPECTED:
        text = f"unexpected error ({type(error).__name__}): {error}; --traceback shows where"
    else:
        text = str(error)
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…"


def printable(text: str) -> str:
    """Return a text of a stranger's as a terminal may see it: control characters spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def expect_shrinking_files() -> None:
    """From now on, a mapped file that is made shorter while it is read ends the process in words.

    Needs the native library; elsewhere the system's signal ends it.
    """
    from cvxq_kernels.cpu import catch_bus_errors

    catch_bus_errors(
        "cvxq: a file that is in use was made shorter, or its disk failed; let nothing write to "
        "it, and start again",
        CORRUPT,
    )


def existing_file(path: Path, expected: str) -> Path:
    """Return `path`, a readable file; otherwise say what was found in place of `expected`."""
    expect_shrinking_files()
    if path.is_dir():
        raise FileProblem(f"{path} is a folder, expected {expected}")
    if not path.exists():
        raise FileProblem(f"{path} does not exist, expected {expected}")
    return path


def read_text(path: Path, expected: str) -> str:
    """Return the text of the file `path`, see `decoded`."""
    return decoded(existing_file(path, expected).read_bytes(), path, expected)


def decoded(data: bytes, where: object, expected: str) -> str:
    """Return bytes as text, see `decode_text`; a byte that is not UTF-8 is a FileProblem."""
    from cvxq_format.text import decode_text

    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        found = f"{where}: byte {error.start} is not UTF-8, expected {expected}"
        raise FileProblem(found) from None

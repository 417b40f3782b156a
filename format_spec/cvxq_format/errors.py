"""What can go wrong with a container, one class per kind of answer the user needs.

    FormatError
    ├── NotCvxqError       the bytes are not a container at all
    ├── UnsupportedError   a valid file that asks for something this version does not know
    ├── TruncatedError     the file ends before it says it does
    ├── CorruptError       the bytes contradict the format or their checksum
    └── WriteError         an argument that cannot be written

Every text says where, what was found, what is allowed and what to do next.
"""

from __future__ import annotations


class FormatError(ValueError):
    """A container could not be read or written."""


class NotCvxqError(FormatError):
    """The file does not start like a .cvxq container."""


class UnsupportedError(FormatError):
    """The file needs a version, feature, codec or transform that this reader does not know."""


class TruncatedError(FormatError):
    """The file is shorter than its own preamble says."""


class CorruptError(FormatError):
    """The file's bytes contradict the format or their checksum."""


class WriteError(FormatError):
    """An argument given to the writer cannot be stored."""

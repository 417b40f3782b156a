"""What can go wrong while converting: one class, one line of text per failure.

Every message says where, what was found, what is allowed and what to do next. Failures inside the
container writer keep their own type (`cvxq_format.FormatError`).
"""


class ConversionError(Exception):
    """The conversion cannot start or cannot go on; the message is one line for the user."""


class NoSuchFileError(ConversionError):
    """There is no folder or file of the model, or of the text, that was named."""


class RateError(ConversionError):
    """No allocation meets the rate or size that was asked for."""


class CutShortError(ConversionError):
    """The work ended for a reason that lies outside of it: the same command may go on later."""


class NotDescribedError(Exception):
    """A decoder's record cannot say what this network computes; the message is why, in one line."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the first non-empty line of an error's text, or the error's type name."""
    for line in str(error).splitlines():
        if line.strip():
            text = line.strip()
            return text if len(text) <= limit else text[: limit - 1] + "…"
    return type(error).__name__

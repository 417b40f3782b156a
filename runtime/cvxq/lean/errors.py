"""Why a model takes the transformers path instead of a lean decoder."""

from __future__ import annotations


class NotLeanError(Exception):
    """The lean decoders do not implement something this model needs; the text is one line.

    Not a failure: whoever catches it runs the model through transformers and says so.
    """

"""A network in memory → the record of what it computes (`cvxq_format.decoder_record`)."""

from __future__ import annotations

from cvxq_converter.errors import NotDescribedError
from cvxq_converter.source.decoding.describing import describe

__all__ = ["NotDescribedError", "describe"]

"""A network in memory → the record of what it computes (`cvxq_format.decoder_record`)."""

from __future__ import annotations

from cvxq_format import json_strict
from cvxq_format.decoder_record import DecoderRecord

from cvxq_converter.errors import NotDescribedError
from cvxq_converter.source.decoding.describing import describe

__all__ = ["NotDescribedError", "describe", "record_bytes"]


def record_bytes(record: DecoderRecord) -> bytes:
    """The document that a file carries, the same bytes for the same record."""
    return json_strict.canonical(record.to_json())

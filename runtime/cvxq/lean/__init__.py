"""Decoders that execute a file's record and need neither transformers nor its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cvxq_format import Reader, UnsupportedError
from cvxq_format.decoder_record import FILE_NAME, DecoderRecord, parse_record
from cvxq_format.model_config import unscaled_length

from cvxq.cache_size import full_context
from cvxq.errors import ArgumentError, no_positions
from cvxq.lean.decoder import Decoder
from cvxq.lean.errors import NotLeanError
from cvxq.lean.products import Tensors
from cvxq.lean.scratch import scratch_for_experts
from cvxq.parts import json_part
from cvxq.summary import json_file, reason_without_record
from cvxq.threads import useful_threads

if TYPE_CHECKING:
    from cvxq.lean.native_decoder import NativeDecoder

__all__ = ["Decoder", "NotLeanError", "Tensors", "open_decoder", "open_exact", "open_native"]


def open_decoder(
    reader: Reader,
    device: str = "cpu",
    threads: int | None = None,
    context: int | None = None,
    beside: Callable[[], None] | None = None,
) -> Decoder:
    """Make the decoder of an open file; the file may be closed afterwards.

    device: "cpu", "cuda" or "cuda:N", already checked; threads: of the CPU, as many as help if
    None; context: its capacity, what the model was made for if None; beside: called before
    the work that leaves Python to other threads, if there is such.
    Raises NotLeanError, with the reason in one line, where transformers has to run the model,
    ArgumentError for a context that the model has no positions for, and CorruptError where the
    record contradicts itself or the tensors.
    """
    config = json_part(reader, "config.json")
    record = record_of(reader)
    capacity = context or full_context(config, record)
    record = _reaching(record, capacity, unscaled_length(config))
    decoder = _open(record, reader, device, threads, config, beside)
    decoder.capacity = capacity
    return decoder


def _reaching(record: DecoderRecord, places: int, unscaled: int | None) -> DecoderRecord:
    """Return the record with `places` at least as its context."""
    if places <= record.context:
        return record
    if unscaled is not None and places > unscaled:
        raise NotLeanError(
            f"its scaling is dynamic past {unscaled} tokens; a context of {unscaled} does without"
        )
    if record.positions is not None:
        raise ArgumentError(no_positions(places, record.context))
    return replace(record, context=places)


def _open(
    record: DecoderRecord,
    reader: Reader,
    device: str,
    threads: int | None,
    config: Mapping[str, Any],
    beside: Callable[[], None] | None,
) -> Decoder:
    if device != "cpu":
        from cvxq.lean.cuda.opening import open_torch_decoder

        return open_torch_decoder(record, reader, device, config)
    threads = threads or useful_threads(reader.path.stat().st_size)
    with scratch_for_experts(record, reader) as scratch:
        return open_native(record, reader, threads, scratch=scratch, beside=beside)


def open_native(
    record: DecoderRecord,
    tensors: Tensors,
    threads: int,
    *,
    exact: bool = False,
    scratch: int = -1,
    beside: Callable[[], None] | None = None,
) -> NativeDecoder:
    """Make the CPU's decoder of `record`; nothing of `tensors` is needed afterwards.

    exact: products in float32 throughout, which is slow; scratch: descriptor of a file that is to
    hold the experts, or with `exact` all packed matrices; beside: as in `open_decoder`.  Raises as
    that does.
    """
    from cvxq.lean.native_decoder import NativeDecoder

    return NativeDecoder(record, tensors, threads, exact=exact, scratch=scratch, beside=beside)


def open_exact(record: DecoderRecord, tensors: Tensors, threads: int, scratch: int = -1) -> Decoder:
    """Make a decoder of `record` that computes in float32 throughout.

    It is PyTorch's where the native library is missing.  scratch: as in `open_native`.  Raises as
    `open_decoder` does.
    """
    from cvxq_kernels import cpu

    if cpu.is_available():
        return open_native(record, tensors, threads, exact=True, scratch=scratch)
    from cvxq.lean.cuda.opening import open_torch_decoder

    return open_torch_decoder(record, tensors, "cpu", {})


def record_of(reader: Reader) -> DecoderRecord:
    """Return the record that the file carries.

    Raises NotLeanError where there is none that this version knows, CorruptError for a wrong one.
    """
    if FILE_NAME not in reader.files:
        raise NotLeanError(reason_without_record(json_file(reader, "report.json")))
    try:
        return parse_record(reader.file(FILE_NAME))
    except UnsupportedError as error:
        raise NotLeanError(str(error)) from None

"""A quantized network → its report, its provenance, its file."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cvxq_format.decoder_record import FILE_NAME as DECODER_FILE
from cvxq_format.decoder_record import DecoderRecord

from cvxq_converter.allocate.bias import BIAS_BITS
from cvxq_converter.allocate.target import TargetResult
from cvxq_converter.errors import NotDescribedError, one_line
from cvxq_converter.measure.measurement import calibration_digest
from cvxq_converter.measure.quality import Divergence
from cvxq_converter.options import ConversionOptions, Place
from cvxq_converter.products import instructions
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.source.decoding import record_bytes
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.write.report import (
    MOST_REASON,
    ConversionReport,
    DecoderReport,
    depth_shares,
    longest_report,
)
from cvxq_converter.write.writing import document_bytes, write_container


def make_report(
    loaded: LoadedModel,
    result: Quantized,
    sequences: torch.Tensor,
    options: ConversionOptions,
    decoder: DecoderReport,
    target: TargetResult | None = None,
) -> ConversionReport:
    """What a conversion did, but for the size of its file. sequences: (S, L), of calibration."""
    tensors = list(result.tensors.values())
    weights = loaded.quantized_weights
    bias_bytes = sum(b.numel() * BIAS_BITS // 8 for b in result.added_biases.values())
    payload = sum(t.payload_size for t in tensors)
    total = payload + len(result.codebook.to_bytes()) + bias_bytes
    codes = sum(t.packed_codes.size for t in tensors)
    quality = result.quality
    return ConversionReport(
        method=options.method.name,
        rate_bits_per_weight=8 * total / weights,
        side_bits_per_weight=8 * (total - codes) / weights,
        parameters=loaded.parameters,
        quantized_weights=weights,
        matrices=len(tensors),
        depth_histogram=depth_shares(tensors),
        gained_biases=len(result.added_biases),
        gain_exponent=result.gain_exponent,
        dual_variable=result.allocation.dual_variable if result.allocation else None,
        ascent_steps=result.allocation.steps if result.allocation else None,
        kl=quality.mean if quality else None,
        kl_standard_error=quality.standard_error if quality else None,
        perplexity_increase=perplexity_increase(quality, options) if quality else None,
        calibration_tokens=sequences.numel(),
        decoder=decoder,
        target=target,
    )


def perplexity_increase(quality: Divergence, options: ConversionOptions) -> float:
    """By what share the perplexity of the sequences behind `quality` grew; 0.01 is 1 %.

    Text sampled from the original costs the quantized network exactly the KL divergence more per
    token, in expectation. Taking the expectation rather than the tokens that happened to be drawn
    leaves their noise out, which is larger than a small increase.
    """
    is_sampled = options.calibration.source == "self"
    return float(np.expm1(quality.mean if is_sampled else quality.loss_increase))


def write_result(
    path: Path,
    loaded: LoadedModel,
    result: Quantized,
    sequences: torch.Tensor,
    options: ConversionOptions,
    report: ConversionReport,
    record: DecoderRecord | None,
) -> None:
    """Write the file of a quantized network, which is the one in memory."""
    documents = _documents(loaded, sequences, options, report)
    if record is not None:
        documents[DECODER_FILE] = record_bytes(record)
    write_container(
        path,
        loaded.source,
        result.codebook,
        result.tensors,
        loaded.unquantized(),
        result.added_biases,
        loaded.aliases,
        documents,
    )


def longest_documents(
    loaded: LoadedModel, sequences: torch.Tensor, options: ConversionOptions
) -> dict[str, bytes]:
    """What a file carries beside the source's files, before it is made.

    The figures of its report are the longest that there may be. The decoder's record, whose size
    depends on the biases that are gained, is not among them.
    """
    try:
        loaded.describe(())
        decoder = DecoderReport(True)
    except NotDescribedError as error:
        decoder = not_proved(error)
    longest = longest_report(
        options.method.name,
        loaded.parameters,
        loaded.quantized_weights,
        len(loaded.matrices),
        sequences.numel(),
        decoder,
    )
    return _documents(loaded, sequences, options, longest)


def not_proved(error: Exception) -> DecoderReport:
    """The report of a file without a record, for the reason that `error` gives."""
    return DecoderReport(False, one_line(error, MOST_REASON))


def _documents(
    loaded: LoadedModel,
    sequences: torch.Tensor,
    options: ConversionOptions,
    report: ConversionReport,
) -> dict[str, bytes]:
    return {
        "provenance.json": document_bytes(provenance(loaded, sequences, options)),
        "report.json": document_bytes(report.for_file()),
    }


def provenance(
    loaded: LoadedModel, sequences: torch.Tensor, options: ConversionOptions
) -> dict[str, Any]:
    """Where the file comes from: enough to make it again. No times, paths or host names."""
    return {
        "source": loaded.source.name,
        "source_sha256": loaded.source.digest,
        "calibration_sha256": calibration_digest(sequences) if sequences.numel() else None,
        **({"notices": list(loaded.notices)} if loaded.notices else {}),
        "options": options.to_json(),
        "instructions": instructions(),
        **surroundings(options.place),
    }


def surroundings(place: Place) -> dict[str, Any]:
    """Versions, kind of device and threads, which the bytes of a result depend on, too."""
    return {
        "versions": {name: _version(name) for name in ("cvxq", "torch", "transformers")},
        "device": torch.device(place.device).type,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    """Return the version of a package; sources that are run as they lie are not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

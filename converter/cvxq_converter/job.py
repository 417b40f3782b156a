"""The stages of a conversion, in order. The only file that knows them all.

    load → calibrate → [ measure → allocate → quantize → correct ] × iterations → write

Every iteration measures the network as the last one left it, quantized, and quantizes the
original weights anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cvxq_converter.bias import BIAS_BITS
from cvxq_converter.calibration import CalibrationOptions, make_sequences
from cvxq_converter.checkpoint import Source, load_tokenizer, open_source
from cvxq_converter.errors import ConversionError
from cvxq_converter.iteration import Quantized, quantize_network
from cvxq_converter.loaded import LoadedModel, load_model
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import Preflight, preflight, refuse_what_cannot_fit
from cvxq_converter.quality import make_reference
from cvxq_converter.report import ConversionReport, depth_histogram
from cvxq_converter.rtn import quantize_rtn, rtn_codebook
from cvxq_converter.stages import Progress, Stages
from cvxq_converter.statistics import MatrixStatistics, measure
from cvxq_converter.writing import write_container

HELD_BACK = 8  # one sequence in eight is kept from the measurement, for the gain and the report


def convert(
    model: str,
    output: Path,
    options: ConversionOptions,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Convert a model folder or hub id into the `.cvxq` file `output`.

    progress: called as (stage, done, total). announce: called with the estimate, one line, before
    the work starts.
    Raises ConversionError for what cannot be converted, RateError for an impossible target.
    An existing `output` is only ever replaced by a complete new file.
    """
    torch.manual_seed(options.seed)
    stages = Stages(progress)
    source = open_source(model, options.revision)
    estimate = _estimate(source, options)
    if announce:
        announce(estimate.line())
    refuse_what_cannot_fit(estimate, output, options.device)
    with stages.stage("load"):
        loaded = load_model(source, options)
    sequences = torch.empty(0, 0, dtype=torch.int64)
    if options.method == "rtn":
        result = _round_to_nearest(loaded, options, stages)
    else:
        with stages.stage("calibrate"):
            wanted = CalibrationOptions(
                options.calibration, estimate.sequences or 1, estimate.length or 2, options.seed
            )
            tokenizer = load_tokenizer(source)
            sequences = make_sequences(loaded.network, tokenizer, wanted, stages.report)
        result = _iterate(loaded, sequences, options, stages)
    return _finish(loaded, result, sequences, output, options, stages)


def _estimate(source: Source, options: ConversionOptions) -> Preflight:
    calibration = "none" if options.method == "rtn" else options.calibration
    return preflight(
        source,
        dtype=options.dtype,
        device=options.device,
        calibration=calibration,
        sequences=options.sequences,
        length=options.length,
        iterations=options.iterations,
        bits=8.0 if options.bits is None else options.bits,
        keeps_originals=options.replaces_weights,
    )


def _iterate(
    loaded: LoadedModel, sequences: torch.Tensor, options: ConversionOptions, stages: Stages
) -> Quantized:
    training, held_back = split_sequences(sequences)

    def write_empty(path: Path, empty: Quantized) -> None:
        _write(path, loaded, empty, sequences, options, _report(loaded, empty, sequences, options))

    if not len(training):
        return quantize_network(loaded, {}, None, options, stages, write_empty)
    with stages.stage("calibrate"):
        reference = make_reference(loaded.network, held_back)
    statistics: dict[str, MatrixStatistics] = {}
    for _ in range(options.iterations):
        with stages.stage("measure"):
            measured = measure(
                loaded.network,
                loaded.matrices,
                training,
                options.metric,
                options.seed,
                stages.report,
            )
        # Beside a pruned matrix nothing is felt; what was felt before it was pruned still holds.
        felt = {n: s for n, s in measured.items() if n not in statistics or s.row_evidence.any()}
        statistics |= felt
        result = quantize_network(loaded, statistics, reference, options, stages, write_empty)
    return result


def split_sequences(sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences to measure on, and those held back; a single one serves for both."""
    if len(sequences) < 2:
        return sequences, sequences
    held = max(1, len(sequences) // HELD_BACK)
    return sequences[:-held], sequences[-held:]


@torch.no_grad()
def _round_to_nearest(loaded: LoadedModel, options: ConversionOptions, stages: Stages) -> Quantized:
    if options.bits is None or options.bits not in range(1, 9):
        raise ConversionError("--method rtn takes whole --bits from 1 to 8, of the codes alone")
    codebook = rtn_codebook()
    tensors = {}
    with stages.stage("quantize") as done:
        for i, matrix in enumerate(loaded.matrices):
            tensors[matrix.name] = quantize_rtn(
                loaded.originals[matrix.name].cpu(),
                int(options.bits),
                options.group_size,
                codebook,
                matrix.source_orientation,
            )
            done(i + 1, len(loaded.matrices))
    return Quantized(tensors, codebook)


def _finish(
    loaded: LoadedModel,
    result: Quantized,
    sequences: torch.Tensor,
    output: Path,
    options: ConversionOptions,
    stages: Stages,
) -> ConversionReport:
    with stages.stage("write"):
        report = _report(loaded, result, sequences, options)
        _write(output, loaded, result, sequences, options, report)
    size = output.stat().st_size
    return report.with_file(size, dict(stages.seconds))


def _report(
    loaded: LoadedModel,
    result: Quantized,
    sequences: torch.Tensor,
    options: ConversionOptions,
) -> ConversionReport:
    tensors = list(result.tensors.values())
    weights = loaded.quantized_weights
    bias_bytes = sum(b.numel() * BIAS_BITS // 8 for b in result.added_biases.values())
    payload = sum(t.payload_size for t in tensors)
    total = payload + len(result.codebook.to_bytes()) + bias_bytes
    codes = sum(t.packed_codes.size for t in tensors)
    return ConversionReport(
        method=options.method,
        rate_bits_per_weight=8 * total / weights,
        side_bits_per_weight=8 * (total - codes) / weights,
        parameters=loaded.parameters,
        quantized_weights=weights,
        matrices=len(tensors),
        depth_histogram=depth_histogram(tensors),
        gained_biases=len(result.added_biases),
        gain_exponent=result.gain_exponent,
        dual_variable=result.allocation.dual_variable if result.allocation else None,
        ascent_steps=result.allocation.steps if result.allocation else None,
        kl=result.quality.mean if result.quality else None,
        kl_standard_error=result.quality.standard_error if result.quality else None,
        calibration_tokens=sequences.numel(),
    )


def _write(
    path: Path,
    loaded: LoadedModel,
    result: Quantized,
    sequences: torch.Tensor,
    options: ConversionOptions,
    report: ConversionReport,
) -> None:
    write_container(
        path,
        loaded.source,
        result.codebook,
        result.tensors,
        loaded.unquantized(),
        result.added_biases,
        loaded.aliases,
        {
            "provenance.json": _provenance(loaded, sequences, options),
            "report.json": report.for_file(),
        },
    )


def _provenance(
    loaded: LoadedModel, sequences: torch.Tensor, options: ConversionOptions
) -> dict[str, Any]:
    """Where the file comes from: enough to make it again. No times, paths or host names."""
    digest = hashlib.sha256(sequences.contiguous().numpy().tobytes()).hexdigest()
    return {
        "source": loaded.source.name,
        "source_sha256": loaded.source.digest,
        "calibration_sha256": digest if sequences.numel() else None,
        "options": options.to_json(),
        "versions": {name: version(name) for name in ("cvxq", "torch", "transformers")},
        "device": torch.device(options.device).type,
        "threads": torch.get_num_threads(),
    }

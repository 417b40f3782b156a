"""The stages of a conversion, in order. The only file that knows them all.

    load → calibrate → reference → [ measure → allocate → quantize → correct ] × iterations
        → prove → write

Every iteration measures the network as the last one left it, quantized, and quantizes the
original weights anew. A measurement kept in a file takes the place of calibrating and measuring.
A target for the loss repeats allocate → quantize → correct at several rates.

Of eight calibration sequences, seven are measured on. Half of the others are for choices (the
gain), the other half for the figures that are reported and that a target is held against.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from cvxq_format.decoder_record import DecoderRecord

from cvxq_converter.allocate.plan import MatrixPlan, make_plans
from cvxq_converter.allocate.prediction import predict_curve
from cvxq_converter.allocate.target import LossTarget, TargetResult, search_rate
from cvxq_converter.beginning import Announce, begin, load
from cvxq_converter.errors import ConversionError, NotDescribedError, one_line
from cvxq_converter.footprint import COPY_BITS, proving_bytes
from cvxq_converter.journal import Journal
from cvxq_converter.measure.calibration import make_sequences, sample_copy
from cvxq_converter.measure.curve import Curve, Trial
from cvxq_converter.measure.forward import InputHessians
from cvxq_converter.measure.hessian import Feedback, Hessians
from cvxq_converter.measure.measurement import (
    Measurement,
    calibration_digest,
    matrices_of,
    measured_options,
    save_measurement,
    shared_arrays,
)
from cvxq_converter.measure.measurement_file import Record
from cvxq_converter.measure.quality import (
    Divergence,
    Reference,
    divergence,
    make_references,
    split_sequences,
)
from cvxq_converter.measure.statistics import Measuring
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.measure.teaching import Lesson, make_lessons
from cvxq_converter.options import Calibration, ConversionOptions, Method, Target
from cvxq_converter.preflight import (
    Preflight,
    allowed_memory,
    size_text,
)
from cvxq_converter.quantize.iteration import quantize_network
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.quantize.rtn import quantize_network_rtn
from cvxq_converter.quantize.tuning import tune_network
from cvxq_converter.ranks import ALONE, Ranks
from cvxq_converter.shapes import shape_of
from cvxq_converter.source.allocator import give_freed_memory_back
from cvxq_converter.source.blocks import Streamed
from cvxq_converter.source.checkpoint import load_tokenizer
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Done, Progress, Stages
from cvxq_converter.write.assembling import (
    longest_documents,
    make_report,
    not_proved,
    perplexity_increase,
    surroundings,
    write_result,
)
from cvxq_converter.write.details import Details, losses_by_position, weight_distributions
from cvxq_converter.write.proof import Decoder, Proof, StoredTensors, prove
from cvxq_converter.write.report import ConversionReport, DecoderReport

if TYPE_CHECKING:
    from cvxq.lean.decoder import Batch

TRIAL_RATES = (2.25, 3.0, 4.0, 5.5)  # at which a measurement checks its prediction


@dataclass(frozen=True)
class Prepared:
    """A loaded network and what was measured on it: enough for any number of quantizations.

    sequences: (S, L) of calibration. statistics: by matrix name. choosing, certifying: the
    original on the held-back sequences; None without calibration. journal: what was done so far.
    room: bytes of Hessians that may be there at once; None for all of them.
    """

    loaded: LoadedModel
    sequences: torch.Tensor
    statistics: dict[str, MatrixStatistics]
    choosing: Reference | None
    certifying: Reference | None
    feedback: Feedback | None = None
    lessons: list[Lesson] = field(default_factory=list)
    journal: Journal = field(default_factory=Journal)
    room: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A quantized network, and the search that led to it where there was one."""

    result: Quantized
    target: TargetResult | None = None
    curve: Curve | None = None


def convert(
    model: str,
    output: Path,
    options: ConversionOptions,
    progress: Progress | None = None,
    announce: Announce | None = None,
    measurement: Measurement | None = None,
    with_details: bool = False,
    resume: bool = True,
    ranks: Ranks = ALONE,
) -> ConversionReport:
    """Convert a model folder, hub id or GGUF file into the `.cvxq` file `output`.

    progress: called as (stage, done, total). announce: called with the estimate, one line, before
    the work starts, then with a line for every trial of a search. measurement: of this model, to
    use instead of calibrating and measuring. with_details: gather what the report's page shows.
    resume: go on from what an earlier call with the same arguments left when it was interrupted.
    ranks: the processes that call this together, of which the first one tells and writes.
    Raises ConversionError for what cannot be converted, RateError for an impossible target.
    An existing `output` is only ever replaced by a complete new file.
    """
    stages, say = _told(progress, announce, ranks)
    begun = begin(model, output, options, say, resume, ranks, measurement, tunes=True)
    with begun as (source, estimate, options, journal):
        loaded = load(source, options, stages, say, journal)
        if options.method.name == "rtn":
            nothing = torch.empty(0, 0, dtype=torch.int64)
            prepared = Prepared(loaded, nothing, {}, None, None, journal=journal)
            target, method = options.target, options.method
            result = quantize_network_rtn(loaded, target, method, stages, journal=journal)
            outcome = Outcome(result)
        else:
            prepared = prepare(loaded, options, estimate, measurement, stages, journal)
            if options.target.seeks_rate:
                outcome = seek(prepared, options, stages, say)
            else:
                outcome = Outcome(quantize_prepared(prepared, options, stages))
        return finish(prepared, outcome, output, options, stages, with_details)


def measure_model(
    model: str,
    output: Path,
    options: ConversionOptions,
    progress: Progress | None = None,
    announce: Announce | None = None,
    resume: bool = True,
    ranks: Ranks = ALONE,
) -> Record:
    """Measure a model folder, hub id or GGUF file; keep what conversions need in `output`.

    options: their target plays no part. The file also holds the curve of rates, sizes and losses,
    corrected by quantizing at `TRIAL_RATES`. resume, ranks: as for `convert`.
    """
    if not options.replaces_weights:
        raise ConversionError(
            "--calibration none leaves nothing to measure, allowed: self, copy, FILE"
        )
    stages, say = _told(progress, announce, ranks)
    begun = begin(model, output, options, say, resume, ranks, trials=len(TRIAL_RATES))
    with begun as (source, estimate, options, journal):
        loaded = load(source, options, stages, say, journal)
        prepared = prepare(loaded, options, estimate, None, stages, journal)
        return _record(prepared, options, output, stages)


def _record(prepared: Prepared, options: ConversionOptions, output: Path, stages: Stages) -> Record:
    """Try the rates, and write the file of a measurement."""
    loaded = prepared.loaded
    with stages.stage("predict"):
        curve = _predict(prepared, _plans(prepared, options), options)
    trials = []
    for rate in TRIAL_RATES:
        if rate > curve.lowest_rate:
            trial = partial(quantize_prepared, prepared, options.at_rate(rate), stages)
            trials.append(Trial(rate, _loss(prepared, rate, trial).mean))
    source = loaded.source
    record = Record(
        source=source.name,
        source_sha256=source.digest,
        options=measured_options(options),
        sequences=prepared.sequences.shape[0],
        length=prepared.sequences.shape[1],
        calibration_sha256=calibration_digest(prepared.sequences),
        matrices=matrices_of(prepared.statistics),
        shared=shared_arrays(prepared.statistics),
        **surroundings(options.place),
        parameters=loaded.parameters,
        quantized_weights=loaded.quantized_weights,
        curve_options={n: options.to_json()[n] for n in ("group_size", "partitions", "keep")},
        curve=curve.with_trials(trials),
    )
    if prepared.journal.ranks.is_first:
        with stages.stage("write"):
            save_measurement(Measurement(record, prepared.sequences, prepared.statistics), output)
    return record


def _told(
    progress: Progress | None, announce: Announce | None, ranks: Ranks
) -> tuple[Stages, Announce]:
    """Who is told what: nobody, by any but the first rank."""
    if not ranks.is_first or announce is None:
        announce = lambda _: None  # noqa: E731
    return Stages(progress if ranks.is_first else None), announce


def prepare(
    loaded: LoadedModel,
    options: ConversionOptions,
    estimate: Preflight,
    measurement: Measurement | None,
    stages: Stages,
    journal: Journal | None = None,
) -> Prepared:
    """Calibrate and measure, unless that was done before; leaves the network as it is."""
    journal = journal or Journal()
    if measurement is not None:
        sequences = measurement.sequences
    else:
        with stages.stage("calibrate") as done:
            count, length = estimate.sequences or 1, estimate.length or 2
            wanted = replace(options.calibration, sequences=count, length=length)
            sequences = calibrate(loaded, wanted, stages, done, journal)
    if not len(sequences):
        return Prepared(loaded, sequences, {}, None, None, journal=journal)
    training, held_back = split_sequences(sequences)
    with stages.stage("reference"):
        choosing, certifying = journal.step(
            "references", lambda: make_references(loaded.streamed, held_back)
        )
        lessons = journal.step("lessons", lambda: _lessons(loaded, training, options))
    measuring, room = journal.within("measure"), estimate.room
    hessians: Hessians | None = None
    if measurement is not None:
        statistics = measurement.statistics_for(loaded)
    else:
        on_the_way = options.method.feedback and room is None
        with stages.stage("measure") as done:
            measured = Measuring(
                *_measured(loaded, training, options, done),
                hessians=on_the_way,
                rounds=estimate.rounds,
                journal=measuring,
            )
            statistics = measured.statistics()
        hessians = measured if on_the_way else None
    if hessians is None:
        apart = journal.within("hessians")
        hessians = InputHessians(loaded, training, statistics, apart, room)
    feedback = Feedback(loaded, statistics, hessians, journal.within("factor"))
    return Prepared(
        loaded, sequences, statistics, choosing, certifying, feedback, lessons, journal, room
    )


def quantize_prepared(prepared: Prepared, options: ConversionOptions, stages: Stages) -> Quantized:
    """Quantize at the rate or size of `options`; leaves the result in the network.

    Its quality is that on the certifying sequences, which took no part in any choice.
    """
    loaded, statistics = prepared.loaded, dict(prepared.statistics)
    feedback, method = prepared.feedback, options.method
    documents = longest_documents(loaded, prepared.sequences, options)
    loaded.restore()
    trial = _trial(prepared, options)
    for iteration in range(method.iterations if statistics else 1):
        journal = trial.within(f"{iteration}")
        if iteration:
            training, _ = split_sequences(prepared.sequences)
            with stages.stage("measure") as done:
                wanted = _measured(loaded, training, options, done)
                measured = Measuring(*wanted, journal=journal.within("measure")).statistics()
            # Beside a pruned matrix nothing is felt; what was felt before still holds.
            statistics |= {n: s for n, s in measured.items() if s.row_evidence.any()}
            apart = journal.within("hessians")
            hessians = InputHessians(loaded, training, statistics, apart, prepared.room)
            feedback = Feedback(loaded, statistics, hessians, journal.within("factor"))
        result = quantize_network(
            loaded,
            statistics,
            feedback,
            prepared.choosing,
            documents,
            options.target,
            method,
            stages,
            journal,
        )
    if prepared.lessons and prepared.choosing is not None:
        lessons, seed = prepared.lessons, options.calibration.seed
        with stages.stage("tune") as done:
            result = tune_network(
                loaded,
                result,
                statistics,
                lessons,
                prepared.choosing,
                method.tune or 0,
                seed,
                done,
                journal,
            )
    if prepared.certifying is not None and prepared.certifying is not prepared.choosing:
        certifying = prepared.certifying
        with stages.stage("certify"):
            quality = journal.step("certify", lambda: divergence(loaded.streamed, certifying))
        result = replace(result, quality=quality)
    return result


def _trial(prepared: Prepared, options: ConversionOptions) -> Journal:
    """The steps of quantizing with these options; those with others are given up."""
    trials = prepared.journal.within("trial")
    own = sha256(json.dumps(options.to_json()).encode()).hexdigest()[:12]
    trials.keep_only(own)
    return trials.within(own)


def _loss(prepared: Prepared, rate: float, attempt: Callable[[], Quantized]) -> Divergence:
    """The loss that an attempt at a rate ends with."""

    def judge() -> Divergence:
        quality = attempt().quality
        assert quality is not None
        return quality

    return prepared.journal.step(f"loss.{rate}", judge, together=True)


def seek(
    prepared: Prepared, options: ConversionOptions, stages: Stages, announce: Announce
) -> Outcome:
    """Quantize at the smallest rate whose loss on the certifying sequences is as asked for."""
    max_kl, max_increase = options.target.max_kl, options.target.max_perplexity_increase
    if max_kl is not None:
        target = LossTarget("--max-kl", max_kl)
    else:
        assert max_increase is not None
        target = LossTarget("--max-perplexity-increase", max_increase)
    with stages.stage("predict"):
        curve = _predict(prepared, _plans(prepared, options), options)
    made: dict[float, Quantized] = {}  # the last one

    def quantize(rate: float) -> Quantized:
        made.clear()
        made[rate] = quantize_prepared(prepared, options.at_rate(rate), stages)
        return made[rate]

    def attempt(rate: float) -> float:
        quality = _loss(prepared, rate, partial(quantize, rate))
        increase = perplexity_increase(quality, options)
        achieved = quality.mean if max_kl is not None else increase
        announce(f"tried {rate:.4f} bits per weight: {target.text(achieved)}")
        return achieved

    best, trials = search_rate(target, curve, attempt)
    rate = best.rate_bits_per_weight
    result = made[rate] if rate in made else quantize(rate)
    found = TargetResult(target.option, target.asked, best.achieved, len(trials))
    return Outcome(result, found, curve.with_trials(trials))


def finish(
    prepared: Prepared,
    outcome: Outcome,
    output: Path,
    options: ConversionOptions,
    stages: Stages,
    with_details: bool = False,
) -> ConversionReport:
    """Prove the decoder's record, write the file and report."""
    loaded, result, sequences = prepared.loaded, outcome.result, prepared.sequences
    ranks, record, decoder, size = prepared.journal.ranks, None, DecoderReport(True), 0
    if ranks.is_first:
        with stages.stage("prove"):
            proof = _prove(loaded, result, options)
            record = proof.record
            decoder = decoder if proof.error is None else not_proved(proof.error)
    decoder = ranks.gather(decoder)[0]
    report = make_report(loaded, result, sequences, options, decoder, outcome.target)
    if ranks.is_first:
        with stages.stage("write"):
            write_result(output, loaded, result, sequences, options, report, record)
            size = output.stat().st_size
    size = ranks.gather(size)[0]
    if with_details:
        with stages.stage("details"):
            details = _details(prepared, outcome, report, options)
        report = replace(report, details=details)
    return report.with_file(size, dict(stages.seconds))


def _prove(loaded: LoadedModel, result: Quantized, options: ConversionOptions) -> Proof:
    """Prove the decoder's record if there is memory for that."""
    needed = proving_bytes(shape_of(loaded.source))
    for device in {"cpu", options.place.device}:
        free = allowed_memory(options.place, device)
        if free is not None and needed > free:
            what = f"proving its record needs {size_text(needed)} of memory on {device}"
            return Proof(None, NotDescribedError(what))
    return prove(loaded, result, _open_exactly)


def _open_exactly(record: DecoderRecord, tensors: StoredTensors) -> Decoder:
    """Make the runtime's decoder of a record, which computes in float32 throughout.

    Its matrices lie in a temporary file.
    """
    from cvxq.lean import NotLeanError, open_exact

    try:
        with tensors.scratch.file() as file:
            return open_exact(record, tensors, torch.get_num_threads(), file.fileno())
    except NotLeanError as error:
        raise NotDescribedError(str(error)) from error


def _details(
    prepared: Prepared, outcome: Outcome, report: ConversionReport, options: ConversionOptions
) -> Details:
    """Curves and distributions; the curve passes through what this conversion achieved."""
    plans = _plans(prepared, options)
    curve = outcome.curve
    if curve is None and options.method.name == "cvxq":
        curve = _predict(prepared, plans, options)
        if report.kl is not None:
            curve = curve.with_trials([Trial(report.rate_bits_per_weight, report.kl)])
    by_group, by_matrix = weight_distributions(
        plans, lambda plan: prepared.loaded.originals[plan.matrix.name]
    )
    quality = outcome.result.quality
    positions = losses_by_position(quality.by_position) if quality else ()
    return Details(curve, bool(prepared.statistics), by_group, by_matrix, positions)


def calibrate(
    loaded: LoadedModel, calibration: Calibration, stages: Stages, done: Done, journal: Journal
) -> torch.Tensor:
    """The sequences; sampling them takes the network whole, or a copy."""
    tokenizer = load_tokenizer(loaded.source)
    if calibration.source == "copy":
        texts = partial(_open_copy, loaded, stages)
        return sample_copy(texts, loaded.hollow, tokenizer, calibration, done, journal)
    if calibration.source != "self":
        return make_sequences(loaded.hollow, tokenizer, calibration, done)

    batches = journal.own().within("batches")

    def sample() -> torch.Tensor:
        with loaded.whole() as network:
            return make_sequences(network, tokenizer, calibration, done, batches)

    sequences = journal.step("sequences", sample)
    batches.keep_only(None)
    give_freed_memory_back()
    return sequences


def _open_copy(loaded: LoadedModel, stages: Stages, texts: int) -> Batch:
    """Texts of a decoder of a copy in 6 bits; ConversionError where there is no such decoder."""
    from cvxq.lean import NotLeanError, open_native
    from cvxq.lean.native_batch import NativeBatch

    made = quantize_network_rtn(loaded, Target(bits=COPY_BITS), Method(), stages, copies=True)
    try:
        record, tensors = loaded.describe(()), StoredTensors(loaded, made)
        return NativeBatch(open_native(record, tensors, torch.get_num_threads()), texts)
    except (NotDescribedError, NotLeanError) as error:
        raise ConversionError(
            f"{loaded.source.name}: a copy cannot be sampled from: {one_line(error)}; "
            "use --calibration FILE"
        ) from None


def _lessons(
    loaded: LoadedModel, training: torch.Tensor, options: ConversionOptions
) -> list[Lesson]:
    if not options.method.tune:
        return []
    with loaded.whole() as network:
        return make_lessons(network, training)


def _measured(
    loaded: LoadedModel, training: torch.Tensor, options: ConversionOptions, done: Done
) -> tuple[Streamed, list[Matrix], torch.Tensor, str, int, Done]:
    """What is measured, and how."""
    metric, seed = options.calibration.metric, options.calibration.seed
    return loaded.streamed, loaded.matrices, training, metric, seed, done


def _plans(prepared: Prepared, options: ConversionOptions) -> list[MatrixPlan]:
    statistics = prepared.statistics
    if prepared.feedback is not None and options.method.feedback:
        statistics = prepared.feedback.foresee(statistics)
    return make_plans(prepared.loaded, statistics, options.method)


def _predict(prepared: Prepared, plans: list[MatrixPlan], options: ConversionOptions) -> Curve:
    loaded, statistics = prepared.loaded, prepared.statistics
    documents = longest_documents(loaded, prepared.sequences, options)
    return predict_curve(loaded, plans, statistics, documents, options.method)

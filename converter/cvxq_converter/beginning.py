"""What comes before the work: the estimate, what cannot be done, what an earlier try has left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from cvxq_converter.amounts import tuning_steps
from cvxq_converter.costs import measure_speed
from cvxq_converter.errors import ConversionError
from cvxq_converter.journal import Journal, bytes_in, open_journal
from cvxq_converter.measure.calibration import read_documents
from cvxq_converter.measure.measurement import Measurement
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import (
    Preflight,
    allowed_memory,
    expected_trials,
    fits_memory,
    preflight,
    refuse_what_cannot_fit,
)
from cvxq_converter.products import fast_products, instructions
from cvxq_converter.ranks import Ranks
from cvxq_converter.source.allocator import give_freed_memory_back
from cvxq_converter.source.checkpoint import Source, open_source
from cvxq_converter.source.loaded import LoadedModel, load_model
from cvxq_converter.stages import Stages
from cvxq_converter.write.assembling import surroundings

Announce = Callable[[str], None]


@contextmanager
def begin(
    model: str,
    output: Path,
    options: ConversionOptions,
    announce: Announce,
    resume: bool,
    ranks: Ranks,
    measurement: Measurement | None = None,
    trials: int | None = None,
    tunes: bool = False,
) -> Iterator[tuple[Source, Preflight, ConversionOptions, Journal]]:
    """Look at the model before any work: estimate, refuse what cannot be done, open the journal.

    Where memory has no room for the network, text is sampled from a copy: the options say so then.
    tunes: the time there is may be for tuning, too, if there is memory for that.
    """
    if not _samples(options, measurement):
        give_freed_memory_back()
    torch.manual_seed(options.calibration.seed)
    if measurement is None and options.calibration.reads_text:
        read_documents(options.calibration.source)  # so that what is wrong with it shows now
    source = open_source(model, options.place.revision)
    if measurement is not None:
        if options.method.name == "rtn" or options.method.iterations > 1:
            raise ConversionError(
                "--statistics are of the original model: they are of no use to --method rtn, and "
                "--iterations would measure again; leave one of them out"
            )
        if options.calibration.time is not None:
            raise ConversionError(
                "--time is for calibrating, which --statistics spare; leave it out"
            )
        measurement.check(source, options)
    folder = _journal_folder(output, options)
    if options.place.scratch is None:
        options = options.having(scratch=output.absolute().parent)
    options = _share(options, ranks)

    ways = [options.having(tune=options.method.tune or 0)]
    if tunes and measurement is None and options.leaves_tuning_open:
        steps = tuning_steps(source, options.calibration, expected_trials(options.target))
        ways.insert(0, options.having(tune=steps))
    if _samples(options, measurement):
        ways.append(ways[-1].having(calibration="copy"))

    with fast_products(options.place.device):
        speed = measure_speed(options.place.dtype, options.place.device)

    def planned(way: int) -> Preflight:
        return preflight(source, ways[way], measurement, trials=trials, speed=speed)

    for way in range(len(ways)):
        estimate = planned(way)
        if fits_memory(estimate, options.place):
            break
    for notice in source.notices:
        announce(notice)
    announce(estimate.line())
    refuse_what_cannot_fit(estimate, output, options.place, bytes_in(folder))
    job = _job(source, options, measurement)
    opened = open_journal(folder, job, announce, not resume, ranks)
    with opened as journal, fast_products(options.place.device):
        # What was decided by the memory and the disk that were free when the job began, holds.
        decision = (way, estimate.rounds, estimate.room)
        before, rounds, room = journal.step("decided", lambda: decision, keep=True)
        if before != way:
            estimate = planned(before)
        yield source, replace(estimate, rounds=rounds, room=room), ways[before], journal


def _share(options: ConversionOptions, ranks: Ranks) -> ConversionOptions:
    """What one of several ranks on a machine has of it: a device, or a part of the memory."""
    place = options.place
    if ranks.here > 1 and place.device == "cuda":
        device = f"cuda:{ranks.local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
        return options.having(device=device)
    free = allowed_memory(place, place.device) if ranks.here > 1 else None
    return options if free is None else options.having(memory=free // ranks.here)


def _journal_folder(output: Path, options: ConversionOptions) -> Path:
    """Where unfinished work is kept: beside the output, whose name it has, or in scratch."""
    name, scratch = f"{output.name}.journal", options.place.scratch
    if scratch is None:
        return output.absolute().with_name(name)
    where = sha256(str(output.absolute()).encode()).hexdigest()[:8]  # outputs of the same name
    return scratch.absolute() / f"{where}-{name}"


def _job(
    source: Source, options: ConversionOptions, measurement: Measurement | None
) -> dict[str, Any]:
    """All that the results of a job's steps depend on."""
    text, code = Path(options.calibration.source), sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    carried = sha256(repr(source.planned_files).encode() + source.config.to_json_string().encode())
    return {
        "model": source.digest,
        "files": carried.hexdigest(),
        **options.to_json(),
        "text": sha256(text.read_bytes()).hexdigest() if text.is_file() else None,
        "statistics": measurement.digest if measurement else None,
        "instructions": instructions(),
        **surroundings(options.place),
        "code": code.hexdigest(),
    }


def load(
    source: Source,
    options: ConversionOptions,
    stages: Stages,
    announce: Announce,
    journal: Journal,
) -> LoadedModel:
    with stages.stage("load"):
        loaded = load_model(source, options)
    if loaded.leftovers:
        announce(loaded.leftovers)
    if len(journal.kept()) > 1:
        announce(f"goes on from {journal.folder}: {_found(journal.kept(), loaded)}")
    return loaded


def _found(steps: list[str], loaded: LoadedModel) -> str:
    """How far the job had come when it was interrupted."""
    blocks, matrices = len(loaded.streamed.blocks), len(loaded.matrices)
    places = [name.split(".")[2] for name in steps if re.match(r"measure\.\d", name)]
    forward, back = places.count("forward"), places.count("sums")
    measured = (blocks + back if back else forward) / (2 * blocks + 2)
    share = 1.0 if "measure.statistics" in steps else measured
    sizes = re.findall(r"^(?:.*\.)?codes\.(\d+)\.", "\n".join(steps), re.MULTILINE)
    quantized = sum(map(int, sizes))
    found = ["calibrated"] if "sequences" in steps else []
    found += [f"measured {share:.0%}"] if share else []
    return ", ".join([*found, f"{quantized} of {matrices} matrices quantized"])


def _samples(options: ConversionOptions, measurement: Measurement | None) -> bool:
    """Whether the model is to write its own calibration text."""
    is_measured = measurement is not None or not options.replaces_weights
    return options.calibration.source == "self" and not is_measured

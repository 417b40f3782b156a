"""Calibrating again as a finished file says it was calibrated, so that its figures can be checked.

A file's provenance holds the options, the seed, the number of threads and the digest of what was
sampled.  It may say anything: nothing of it is taken to be true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cvxq_converter.amounts import calibration_amount
from cvxq_converter.errors import ConversionError
from cvxq_converter.job import calibrate
from cvxq_converter.journal import Journal
from cvxq_converter.measure.measurement import calibration_digest
from cvxq_converter.measure.quality import choosing_and_certifying, split_sequences
from cvxq_converter.options import ConversionOptions
from cvxq_converter.products import fast_products, instructions
from cvxq_converter.source.checkpoint import Source, open_source
from cvxq_converter.source.loaded import load_model
from cvxq_converter.stages import Progress, Stages
from cvxq_converter.write.assembling import surroundings

MOST_TOKENS = 1 << 22  # that are sampled again


@dataclass(frozen=True)
class Recalibration:
    """What calibrating again gave.

    is_source: whether the model's digest is that of the file's source. is_same: whether the tokens
    are; None where the file was not calibrated. differs: what of versions, device and threads is
    other than it was. certifying: (S, L), the sequences that figures are reported of.
    """

    is_source: bool
    is_same: bool | None
    differs: tuple[str, ...]
    certifying: torch.Tensor


def recalibrate(
    model: str,
    provenance: Mapping[str, Any],
    text: Path | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Recalibration:
    """Make the calibration sequences of a file again, from its source.

    model: the source, as for `convert`. provenance: the file's. text: the file that calibration
    text came from, where it did.
    Raises ConversionError for a provenance that cannot be followed, and what conversion raises.
    """
    options = _options(provenance, text)
    source = open_source(model, options.place.revision)
    for notice in source.notices if announce else ():
        announce(notice)  # type: ignore[misc]
    stages = Stages(progress)
    with _threads(provenance.get("threads")), fast_products("cpu"):
        differs = _differences(provenance, options)
        sequences = torch.empty(0, 2, dtype=torch.int64)
        if options.replaces_weights:
            wanted = options.calibration
            count, length = calibration_amount(source, "cpu", wanted)
            if count * length > MOST_TOKENS:
                raise ConversionError(
                    f"the file says it was calibrated on {count} × {length} tokens, allowed "
                    f"{MOST_TOKENS} altogether; give a text with --text"
                )
            loaded = load_model(source, options)
            with stages.stage("calibrate") as done:
                wanted = replace(wanted, sequences=count, length=length)
                sequences = calibrate(loaded, wanted, stages, done, Journal())
    stated = provenance.get("calibration_sha256")
    return Recalibration(
        is_source=source.digest == provenance.get("source_sha256"),
        is_same=None if stated is None else calibration_digest(sequences) == stated,
        differs=differs,
        certifying=_certifying(sequences, source),
    )


def _options(provenance: Mapping[str, Any], text: Path | None) -> ConversionOptions:
    """The options that the provenance names, those without influence left out."""
    named = provenance.get("options")
    if not isinstance(named, Mapping):
        raise ConversionError(
            "the file has no provenance, so it claims nothing of its model; only convert gives one"
        )
    choices = {**named, "dtype": getattr(torch, str(named.get("dtype")), None)}
    try:
        choices["keep"] = tuple(named.get("keep", ()))
        if text is not None:
            choices["calibration"] = str(text)
        options = ConversionOptions.of(**choices)
    except (TypeError, ValueError) as error:
        raise ConversionError(
            f"the file's provenance names options that this version does not know: {error}"
        ) from error
    source = options.calibration.source
    if text is None and source not in ("self", "copy", "none"):
        raise ConversionError(f"the file was calibrated on {source}; give that text with --text")
    return options


def _certifying(sequences: torch.Tensor, source: Source) -> torch.Tensor:
    """The sequences that the file's figures are of."""
    if not len(sequences):
        return sequences
    _, held_back = split_sequences(sequences)
    return choosing_and_certifying(held_back, source.config.get_text_config().vocab_size)[1]


@contextmanager
def _threads(count: Any) -> Iterator[None]:
    """Compute with as many threads as the file says, which sampling depends on."""
    before = torch.get_num_threads()
    if isinstance(count, int) and 1 <= count <= 256:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _differences(provenance: Mapping[str, Any], options: ConversionOptions) -> tuple[str, ...]:
    here = {**surroundings(options.place), "instructions": instructions()}
    return tuple(
        f"{name} {provenance.get(name)}, here {value}"
        for name, value in here.items()
        if provenance.get(name) != value
    )

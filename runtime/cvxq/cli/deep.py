"""Whether a sound file is right: its record against transformers, its figures against a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvxq_format import Reader

from cvxq.cli.conversion import announce
from cvxq.cli.failures import FileProblem
from cvxq.cli.options import quiet_transformers
from cvxq.cli.output import Progress
from cvxq.cli.subject import load_subject
from cvxq.extras import need
from cvxq.summary import json_file

if TYPE_CHECKING:
    from cvxq_converter.recheck import Recalibration
    from transformers import PreTrainedModel

    from cvxq.lean.decoder import Decoder

MOST_PLACES = 2048  # of a text that the record is compared on
STANDARD_ERRORS = 2


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; holds: None where nothing could be compared."""

    name: str
    holds: bool | None
    text: str


def check_record(path: Path, threads: int | None) -> Check:
    """Compare the decoder that the record describes with transformers, on the file's weights."""
    need("convert", "verify --deep")
    quiet_transformers()
    import transformers

    from cvxq.lean import NotLeanError, open_exact, record_of
    from cvxq.network import load_network
    from cvxq.threads import useful_threads

    with Reader(path) as reader:
        try:
            record = record_of(reader)
            decoder = open_exact(record, reader, threads or useful_threads(path.stat().st_size))
        except NotLeanError as error:
            return Check("record", None, f"runs through transformers: {error}")
        network = load_network(reader, keep_packed=False, threads=threads)
        switches = [rope.switch for rope in record.ropes]
        reaches = [layer.attention.window for layer in record.layers] + switches
        places = [64, *(min(MOST_PLACES, reach + 16) for reach in reaches if reach is not None)]
        texts = sorted({min(record.context, count) for count in places})
        routed = any(layer.feed_forward.experts is not None for layer in record.layers)
        worst = max((_compared(network, decoder, count, routed) for count in texts), default=None)
    assert worst is not None
    short = "" if max(texts) > max([0, *(r for r in reaches if r)]) else ", its windows not reached"
    return Check(
        "record",
        worst.error <= worst.limit and worst.kl <= worst.largest_kl,
        f"logits differ from those of transformers {transformers.__version__} by "
        f"{worst.error:.1g} at most, allowed {worst.limit:.1g} ({max(texts)} tokens{short})",
    )


@dataclass(frozen=True, order=True)
class _Difference:
    """share: error against its limit, by which differences are ordered."""

    share: float
    error: float
    limit: float
    kl: float
    largest_kl: float


def _compared(network: PreTrainedModel, decoder: Decoder, count: int, routed: bool) -> _Difference:
    """The difference on a random text; of several where rounding may choose another expert."""
    from cvxq_converter.write.proof import TEXTS

    return min(_differences(network, decoder, count, TEXTS if routed else 1))


def _differences(
    network: PreTrainedModel, decoder: Decoder, count: int, texts: int
) -> Iterator[_Difference]:
    import torch
    from cvxq_converter.write.proof import LARGEST_ERROR, LARGEST_KL, LARGEST_SHARE, SEED

    from cvxq.angles import Angles

    for index in range(texts):
        generator = torch.Generator().manual_seed(SEED + index)
        ids = torch.randint(decoder.vocabulary, (count,), generator=generator)
        ours = torch.as_tensor(decoder.logits(ids.tolist())).double()
        with torch.inference_mode(), Angles(network).of(count):
            theirs = network(input_ids=ids[None], use_cache=False).logits[0].double()
        error = float((ours - theirs).abs().max())
        limit = max(LARGEST_ERROR, LARGEST_SHARE * float(theirs.max() - theirs.min()))
        p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
        kl = abs(float((p.exp() * (p - q)).sum(-1).mean()))
        share = math.inf if math.isnan(error) else error / limit
        yield _Difference(share, error if share < math.inf else math.inf, limit, kl, LARGEST_KL)


def check_claims(path: Path, model: str, text: Path | None, threads: int | None) -> Iterator[Check]:
    """Calibrate again, measure again, and compare with what the file says of itself."""
    need("convert", "verify --against")
    quiet_transformers()
    from cvxq_converter.recheck import recalibrate

    with Reader(path) as reader:
        provenance = json_file(reader, "provenance.json") or {}
        report = json_file(reader, "report.json") or {}
    progress = Progress()
    again = recalibrate(model, provenance, text, progress, announce)
    told = "is" if again.is_source else "is not"
    yield Check("source", again.is_source, f"{model} {told} the model that the file names")
    yield _calibration(again)
    if len(again.certifying):
        yield from _figures(path, model, report, again, threads, progress)


def _calibration(again: Recalibration) -> Check:
    if again.is_same is None:
        return Check("calibration", None, "the file was not calibrated, and has no figures")
    if again.is_same:
        return Check("calibration", True, "the same tokens again")
    if again.differs:
        text = f"other tokens; the file was made with {'; '.join(again.differs)}"
        return Check("calibration", None, text)
    return Check("calibration", False, "other tokens than the digest in the file is of")


def _figures(
    path: Path,
    model: str,
    report: dict[str, Any],
    again: Recalibration,
    threads: int | None,
    progress: Progress,
) -> Iterator[Check]:
    from cvxq import evaluate

    ours = load_subject(str(path), weights="packed", threads=threads)
    original = load_subject(model, threads=threads)
    windows = [evaluate.Window(ids.numpy(), 1) for ids in again.certifying]
    found = evaluate.divergence(ours.network, original.network, windows, progress)
    stated, error = _number(report, "kl"), _number(report, "kl_standard_error")
    yield _compare("KL", stated, error, found.kl.mean, found.kl.standard_error, again.is_same)
    increase = math.expm1(found.nll_increase.mean)
    width = math.exp(found.nll_increase.mean) * found.nll_increase.standard_error
    stated = _number(report, "perplexity_increase")
    yield _compare("perplexity increase", stated, width, increase, width, again.is_same)


def _number(report: dict[str, Any], name: str) -> float | None:
    value = report.get(name)
    return float(value) if isinstance(value, int | float) else None


def _compare(
    name: str,
    stated: float | None,
    stated_error: float | None,
    found: float,
    found_error: float,
    same_tokens: bool | None,
) -> Check:
    """Hold a figure against what was found; on other tokens both are uncertain."""
    text = f"{found:.6f} ± {found_error:.6f}"
    if stated is None:
        return Check(name, None, f"{text}; the file states none")
    width = found_error if same_tokens else math.hypot(found_error, stated_error or 0)
    holds = abs(found - stated) <= STANDARD_ERRORS * width
    return Check(name, holds, f"{text}, {stated:.6f} stated")


def check_options(deep: bool, against: str | None, text: Path | None) -> None:
    """Raise FileProblem or UsageError for options that do not go together."""
    import click

    if against is not None and not deep:
        raise click.UsageError("--against is for --deep; give both")
    if text is not None and against is None:
        raise click.UsageError("--text is the calibration text of --against; give both")
    if text is not None and not text.is_file():
        raise FileProblem(f"{text} does not exist, expected the text that calibration used")

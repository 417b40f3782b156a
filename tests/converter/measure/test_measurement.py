"""A measurement in a file: the same conversions with it as without, and nothing else accepted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.errors import ConversionError, RateError
from cvxq_converter.job import TRIAL_RATES, convert, measure_model
from cvxq_converter.measure.curve import Curve, Point, Trial
from cvxq_converter.measure.measurement import (
    FIELDS,
    Measurement,
    load_measurement,
    save_measurement,
)
from cvxq_converter.measure.measurement_file import KEY, read_record
from cvxq_converter.measure.quality import Divergence, divergence
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.options import ConversionOptions
from cvxq_format import Reader
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

Save = Callable[..., Path]
COMMON: dict[str, Any] = {"group_size": 16, "sequences": 32, "length": 12, "seed": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


def options(**changes: Any) -> ConversionOptions:
    chosen = {**COMMON, **changes}
    if not {"bits", "size_bytes", "max_kl", "max_perplexity_increase"} & set(chosen):
        chosen["bits"] = 4.0
    return ConversionOptions.of(**chosen)


@pytest.fixture(scope="module")
def folder(save_network: Save) -> Path:
    """A tied Llama of one layer, wide enough for side information to leave room for rates."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    return save_network("llama-tied", **sizes)


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "model.stats.safetensors"
    measure_model(str(folder), path, options())
    return path


@pytest.fixture
def measurement(file: Path) -> Measurement:
    return load_measurement(file)


def calls_of(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Note the calls of functions that `job` uses."""
    import cvxq_converter.job as job

    called: list[str] = []

    def noting(name: str) -> Any:
        genuine = getattr(job, name)

        def note(*arguments: Any, **named: Any) -> Any:
            called.append(name)
            return genuine(*arguments, **named)

        return note

    for name in names:
        monkeypatch.setattr(job, name, noting(name))
    return called


# --- the same with it as without ----------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [{"bits": 2.6}, {"size_bytes": 45_000}, {"max_kl": 0.05}, {"bits": 5.0, "keep": "*q*"}],
)
def test_a_conversion_from_the_file_writes_the_same_bytes(
    target: dict[str, Any],
    folder: Path,
    measurement: Measurement,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "keep" in target:
        target = {**target, "keep": (target["keep"],)}
    direct, reused = tmp_path / "direct.cvxq", tmp_path / "reused.cvxq"
    expected = convert(str(folder), direct, options(**target))
    called = calls_of(monkeypatch, "make_sequences", "Measuring", "quantize_network")
    found = convert(str(folder), reused, options(**target), measurement=measurement)
    assert set(called) == {"quantize_network"}
    assert reused.read_bytes() == direct.read_bytes()
    assert replace(found, stage_seconds={}) == replace(expected, stage_seconds={})
    assert {"calibrate", "measure"} & set(found.stage_seconds) == set()


def test_the_measurement_itself_is_the_same_every_time(
    folder: Path, file: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.safetensors"
    record = measure_model(str(folder), again, options(size_bytes=1))
    assert again.read_bytes() == file.read_bytes()
    assert again.stat().st_mode == (folder / "config.json").stat().st_mode  # not for us alone
    assert record == read_record(again)
    assert list(tmp_path.iterdir()) == [again]


def test_the_record_tells_where_it_comes_from(file: Path, folder: Path) -> None:
    record = read_record(file)
    assert record.source == folder.name
    assert (record.sequences, record.length) == (32, 12)
    assert record.options["seed"] == 5
    assert record.curve_options == {"group_size": 16, "partitions": 8, "keep": []}
    assert str(folder.parent) not in file.read_bytes().decode("latin-1")
    curve = record.curve
    assert [t.rate_bits_per_weight for t in curve.trials] == [
        rate for rate in TRIAL_RATES if rate > curve.lowest_rate
    ]
    sizes = [p.file_bytes for p in curve.points]
    assert sizes == sorted(sizes)
    losses = [p.predicted for p in curve.points if p.rate_bits_per_weight >= 2.5]
    assert losses == sorted(losses, reverse=True)


def test_sizes_of_the_curve_are_those_of_the_files(
    folder: Path, measurement: Measurement, tmp_path: Path
) -> None:
    for point in measurement.record.curve.points[::9]:
        chosen = options(bits=point.rate_bits_per_weight, gain=0.5)
        report = convert(str(folder), tmp_path / "a.cvxq", chosen, measurement=measurement)
        assert report.file_bytes == pytest.approx(point.file_bytes, abs=400)


# --- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_kl", "max_perplexity_increase"])
@pytest.mark.parametrize("asked", [0.03, 0.2])
def test_a_target_is_met_and_hardly_exceeded(
    name: str, asked: float, folder: Path, measurement: Measurement, tmp_path: Path
) -> None:
    path, lines = tmp_path / "a.cvxq", list[str]()
    chosen = options(**{name: asked})
    report = convert(str(folder), path, chosen, None, lines.append, measurement)
    assert report.target is not None
    assert report.target.asked == asked
    # Of so few weights every one counts, and so does every level table that begins to pay: the
    # loss jumps from rate to rate.
    assert 0.75 * asked <= report.target.achieved <= asked
    assert report.kl is not None
    increase = report.perplexity_increase
    assert increase == pytest.approx(math.expm1(report.kl))  # text of the model's own
    assert report.target.achieved == (report.kl if name == "max_kl" else increase)
    tried = [line for line in lines if line.startswith("tried ")]
    assert report.target.trials == len(tried)
    with Reader(path) as reader:
        carried = json.loads(reader.file("report.json"))
        asked_for = json.loads(reader.file("provenance.json"))["options"]
    assert carried["target"]["achieved"] == pytest.approx(report.target.achieved, rel=1e-5)
    assert asked_for[name] == asked
    assert asked_for["bits"] is None
    rate = report.rate_bits_per_weight
    again = tmp_path / "b.cvxq"
    at_rate = convert(str(folder), again, options(bits=rate + 1e-9), measurement=measurement)
    if stored_tables(again) == stored_tables(path):
        assert at_rate.kl == report.kl  # the very same weights
    else:  # one that pays at the rate tried need not at the rate achieved: so few are the weights
        assert at_rate.rate_bits_per_weight < rate


def stored_tables(path: Path) -> int:
    """Mask of the depths whose level tables a file holds."""
    with Reader(path) as reader:
        return reader.header.codebooks[0].level_depths


def test_on_a_text_the_tokens_that_came_count(
    folder: Path, measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the expectation that the sampled text of the other tests allows."""
    text = replace(measurement.record, options={**measurement.record.options, "calibration": "a"})
    other = replace(measurement, record=text)
    judged: list[Divergence] = []

    def note(*arguments: Any) -> Divergence:
        judged.append(divergence(*arguments))
        return judged[-1]

    monkeypatch.setattr("cvxq_converter.job.divergence", note)
    report = convert(str(folder), tmp_path / "a.cvxq", options(calibration="a"), measurement=other)
    assert report.kl is not None
    assert report.perplexity_increase != pytest.approx(math.expm1(report.kl), rel=1e-3)
    assert report.kl == judged[-1].mean
    assert report.perplexity_increase == pytest.approx(math.expm1(judged[-1].loss_increase))


def test_a_target_out_of_reach_says_what_is_within(
    folder: Path, measurement: Measurement, tmp_path: Path
) -> None:
    message = r"^--max-kl 1e-12: even at 8 bits per weight there is a KL of \S+ nats per token; ask"
    with pytest.raises(RateError, match=message):
        convert(str(folder), tmp_path / "a.cvxq", options(max_kl=1e-12), measurement=measurement)
    assert not list(tmp_path.iterdir())


def test_what_certifies_a_target_chooses_nothing(
    folder: Path, measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gain is chosen on other sequences than those the report's KL is of."""
    import cvxq_converter.job as job
    import cvxq_converter.quantize.correction as correction

    seen: dict[str, set[tuple[int, ...]]] = {"correction": set(), "job": set()}
    for module, name in ((correction, "correction"), (job, "job")):
        genuine = module.divergence

        def note(network: Any, reference: Any, name: str = name, genuine: Any = genuine) -> Any:
            seen[name] |= {tuple(row.tolist()) for row in reference.sequences}
            return genuine(network, reference)

        monkeypatch.setattr(module, "divergence", note)
    measured: list[torch.Tensor] = []
    genuine_measure = job.Measuring
    monkeypatch.setattr(
        job, "Measuring", lambda *a, **n: (measured.append(a[2]), genuine_measure(*a, **n))[1]
    )
    convert(str(folder), tmp_path / "a.cvxq", options())
    rows = [tuple(row.tolist()) for row in measurement.sequences]
    assert measured[0].tolist() == [list(row) for row in rows[:28]]
    assert seen["correction"] == set(rows[28:30])
    assert seen["job"] == set(rows[30:])


# --- nothing else accepted ----------------------------------------------------------------------


def test_another_model_is_refused(save_network: Save, measurement: Measurement) -> None:
    other = save_network("llama")
    with pytest.raises(
        ConversionError,
        match=r"^the statistics are of llama-tied \(sha256 [0-9a-f]{12}…\), the model is llama \(",
    ):
        convert(str(other), Path("unused.cvxq"), options(), measurement=measurement)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "--seed 6: the statistics were measured with 5; measure again, or leave"),
        ({"sequences": 31}, "--sequences 31: the statistics were measured with 32"),
        ({"length": 11}, "--length 11: the statistics were measured with 12"),
        ({"metric": "logits"}, "--metric logits: the statistics were measured with kl"),
        ({"calibration": "a/b.txt"}, "--calibration b.txt: the statistics were measured with self"),
        ({"calibration": "none"}, "--calibration none: the statistics were measured with self"),
        ({"dtype": torch.bfloat16}, "--dtype bfloat16: the statistics were measured with float32"),
        ({"time": 60.0, "sequences": None}, "--time is for calibrating, which --statistics spare"),
        ({"iterations": 2}, "--statistics are of the original model"),
        ({"method": "rtn"}, "--statistics are of the original model"),
    ],
)
def test_other_options_are_refused(
    change: dict[str, Any], message: str, folder: Path, measurement: Measurement
) -> None:
    with pytest.raises(ConversionError) as caught:
        convert(str(folder), Path("unused.cvxq"), options(**change), measurement=measurement)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_defaults_that_were_measured_may_be_spelled_out(
    folder: Path, tmp_path: Path, measurement: Measurement
) -> None:
    """32 sequences asked for, or 32 by default: the same."""
    record = measurement.record
    by_default = replace(record, options={**record.options, "sequences": None})
    found = replace(measurement, record=by_default)
    convert(str(folder), tmp_path / "a.cvxq", options(gain=0.5), measurement=found)
    convert(str(folder), tmp_path / "a.cvxq", options(gain=0.5, sequences=None), measurement=found)


def test_a_matrix_that_was_not_measured_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    measure_model(str(folder), path, options(keep=("*gate*",)))
    kept = load_measurement(path)
    with pytest.raises(ConversionError, match=r"^model.layers.0.mlp.gate_proj.weight was not meas"):
        convert(str(folder), tmp_path / "a.cvxq", options(), measurement=kept)


def test_measuring_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="leaves nothing to measure"):
        measure_model(str(folder), tmp_path / "a", options(calibration="none"))


# --- the file -----------------------------------------------------------------------------------


def damaged(
    file: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]
) -> Path:
    """Copy the file with its tensors and its record changed."""
    arrays = load_file(file)
    with safe_open(file, framework="numpy") as reader:
        record = json.loads(reader.metadata()[KEY])
    change(arrays, record)
    save_file(arrays, target, {KEY: json.dumps(record)})
    return target


HEAD = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a, r: a.pop(f"{HEAD}/row_sensitivity"),
            "row_sensitivity is missing, expected float",
        ),
        (
            lambda a, r: a.update({f"{HEAD}/row_evidence": np.ones(3, np.int64)}),
            r"is int64 \(3,\), ",
        ),
        (
            lambda a, r: a.update({f"{HEAD}/input_mean": np.ones(64, np.float64)}),
            r"is float64 \(64,\), expected float32 \(64,\)",
        ),
        (lambda a, r: a[f"{HEAD}/input_mean"].fill(np.nan), "input_mean is not finite"),
        (lambda a, r: a.update(more=np.ones(1)), "more is not part of a measurement"),
        (lambda a, r: a["sequences"].__setitem__((0, 0), 3), "its calibration tokens are damaged"),
        (lambda a, r: a.pop("sequences"), "its calibration tokens are damaged"),
        (lambda a, r: r.update(version=2), "a measurement of version 2, this cvxq reads 1"),
        (lambda a, r: r.pop("curve"), r"its description cannot be read \('curve'\); measure again"),
        (lambda a, r: r.update(unknown=1), "its description cannot be read"),
        (lambda a, r: r["curve"]["points"].append({}), "its description cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    change: Any, message: str, file: Path, tmp_path: Path
) -> None:
    path = damaged(file, tmp_path / "damaged.safetensors", change)
    with pytest.raises(ConversionError, match=message) as caught:
        load_measurement(path)
    assert str(caught.value).startswith("damaged.safetensors: ")
    assert "\n" not in str(caught.value)


def test_files_of_another_kind(tmp_path: Path, folder: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("no tensors")
    for path in (text, folder / "model.safetensors", tmp_path):
        with pytest.raises(ConversionError, match=r"not a measurement.*; make one with cvxq meas"):
            load_measurement(path)
    with pytest.raises(ConversionError, match="no such file"):
        load_measurement(tmp_path / "none")


def test_a_truncated_file_is_refused(file: Path, tmp_path: Path) -> None:
    data, path = file.read_bytes(), tmp_path / "short"
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ConversionError, match="not a measurement"):
            load_measurement(path)


def test_every_field_of_the_statistics_has_its_place_in_the_file() -> None:
    assert {f.name for f in fields(MatrixStatistics)} == {*FIELDS, "sequences"}


def test_arrays_that_matrices_share_are_stored_once(
    measurement: Measurement, tmp_path: Path
) -> None:
    """Queries, keys and values see the same inputs; nothing else is equal but evidence."""
    shared, path = measurement.record.shared, tmp_path / "again.safetensors"
    first, second = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    assert shared[f"{second}/input_mean"] == f"{first}/input_mean"
    assert f"{first}/input_mean" not in shared
    assert f"{second}/row_sensitivity" not in shared
    save_measurement(measurement, path)
    assert not set(shared) & set(load_file(path))
    found = load_measurement(path).statistics
    assert found[second].input_mean is found[first].input_mean
    for name, stats in measurement.statistics.items():
        for field in FIELDS:
            assert np.array_equal(getattr(found[name], field), getattr(stats, field))


def test_an_interrupted_save_leaves_the_older_file(
    measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_measurement(measurement, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_curve_needs_no_tensors(measurement: Measurement) -> None:
    curve = Curve((Point(1.0, 10, 1.0), Point(2.0, 20, 0.25)), (Trial(1.5, 0.5),))
    metadata = replace(measurement.record, curve=curve).to_metadata()
    assert type(measurement.record).from_metadata(metadata, "a").curve == curve

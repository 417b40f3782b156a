"""`cvxq measure` and `cvxq plan`, and conversions from what was measured."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cvxq_converter.measure.curve import Curve, Point, Trial
from cvxq_converter.measure.measurement_file import Record

Cvxq = Callable[..., Result]
Fails = Callable[..., str]
SHORT = ("--sequences", 6, "--length", 12, "--group-size", 16, "--seed", 3)


@pytest.fixture
def record() -> Record:
    """What a measurement says about itself, with a curve of three points and one trial."""
    points = (Point(0.5, 1000, 2.0), Point(2.0, 4000, 0.2), Point(8.0, 16000, 0.0001))
    return Record(
        source="tiny",
        source_sha256="0" * 64,
        options={"seed": 0},
        sequences=4,
        length=8,
        calibration_sha256="1" * 64,
        matrices={},
        shared={},
        versions={},
        device="cpu",
        threads=1,
        parameters=16000,
        quantized_weights=15000,
        curve_options={},
        curve=Curve(points, (Trial(3.0, 0.1),)),
    )


@pytest.fixture
def statistics(record: Record, tmp_path: Path) -> Path:
    """A file with that record and no statistics: planning needs none."""
    import numpy as np
    from safetensors.numpy import save_file

    path = tmp_path / "stats.safetensors"
    save_file({"sequences": np.zeros((4, 8), np.int32)}, path, record.to_metadata())
    return path


def test_the_plan_lists_points_and_trials_by_rate(cvxq: Cvxq, statistics: Path) -> None:
    printed = json.loads(cvxq("plan", statistics, "--json").stdout)
    assert printed["source"] == "tiny"
    curve = printed["curve"]
    assert [entry["rate_bits_per_weight"] for entry in curve] == [0.5, 2.0, 3.0, 8.0]
    assert [entry["kl_found"] for entry in curve] == [None, None, 0.1, None]
    assert curve[2]["kl_expected"] == pytest.approx(0.1)
    assert curve[2]["file_bytes"] == 6000
    assert curve[2]["file_bits_per_parameter"] == 3.0
    assert curve[2]["perplexity_increase_expected"] == pytest.approx(0.10517, rel=1e-4)
    # the trial's factor holds for all rates
    plain = [2.0, 0.2, None, 0.0001]
    factors = [e["kl_expected"] / p for e, p in zip(curve, plain, strict=True) if p]
    assert factors == pytest.approx([factors[0]] * 3)


def test_in_a_pipe_the_plan_is_plain(cvxq: Cvxq, statistics: Path) -> None:
    lines = [line.split("\t") for line in cvxq("plan", statistics).stdout.splitlines()]
    assert lines[0][:2] == ["rate_bits_per_weight", "file_bytes"]
    assert [line[0] for line in lines[1:]] == ["0.5", "2", "3", "8"]
    assert [line[1] for line in lines[1:]] == ["1000", "4000", "6000", "16000"]
    assert {len(line) for line in lines} == {6}


def test_on_a_terminal_the_plan_is_a_table(
    record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    from cvxq.cli.output import print_table
    from cvxq.cli.plan import COLUMNS, _cells, curve_entries

    print_table("tiny", COLUMNS, [_cells(entry) for entry in curve_entries(record)], 0)
    printed = capsys.readouterr().out
    assert "16,000" in printed
    assert "+10.52%" in printed
    assert "×" in printed  # more than twice the perplexity


@pytest.mark.parametrize("name", ["curve.png", "curve.svg"])
def test_the_plan_is_drawn(name: str, cvxq: Cvxq, statistics: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra cvxq[plot] is not installed")
    first, second = tmp_path / name, tmp_path / f"again-{name}"
    for path in (first, second):
        assert cvxq("plan", statistics, "--plot", path).exit_code == 0
    assert first.read_bytes() == second.read_bytes()
    start = b"\x89PNG" if name.endswith("png") else b"<?xml"
    assert first.read_bytes().startswith(start)
    if name.endswith("png"):
        from PIL import Image

        with Image.open(first) as image:
            colours = image.convert("RGB").getcolors(1 << 20)
            assert image.width > 800
        assert colours is not None
        assert len(colours) > 50


def test_a_picture_that_finds_no_room_leaves_the_older_one(
    fails: Fails, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra cvxq[plot] is not installed")
    picture = tmp_path / "curve.svg"
    picture.write_bytes(b"older")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(picture))

    monkeypatch.setattr("cvxq_format.unfinished._Named.write", full)
    assert "No space left" in fails(3, "plan", statistics, "--plot", picture)
    assert picture.read_bytes() == b"older"
    assert sorted(tmp_path.iterdir()) == sorted([picture, statistics])


def test_drawing_without_matplotlib_says_what_to_install(
    fails: Fails, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    said = fails(5, "plan", statistics, "--plot", tmp_path / "a.png")
    assert said == ("plan --plot needs matplotlib, not installed here: pip install 'cvxq[plot]'")


def test_plans_that_cannot_be(fails: Fails, statistics: Path, tmp_path: Path) -> None:
    assert "must end in .png or .svg" in fails(2, "plan", statistics, "--plot", "curve.pdf")
    assert "does not exist" in fails(3, "plan", tmp_path / "none")
    text = tmp_path / "a.txt"
    text.write_text("no measurement")
    assert "not a measurement" in fails(6, "plan", text)


@pytest.mark.slow
def test_from_measuring_to_a_file(
    cvxq: Cvxq, fails: Fails, original_folder: tuple[Path, Path], tmp_path: Path
) -> None:
    """Options of the measurement need not be repeated, and cannot be contradicted."""
    _, folder = original_folder
    stats, target = tmp_path / "stats.safetensors", tmp_path / "out.cvxq"
    result = cvxq("measure", folder, "-o", stats, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert "6 × 12 tokens" in result.stdout
    assert "KL at 4 bits" in result.stdout
    assert len(json.loads(cvxq("plan", stats, "--json").stdout)["curve"]) > 20
    common = ("convert", folder, "--group-size", 16, "--bits", 4)
    result = cvxq(*common, "-o", target, "--statistics", stats)
    assert result.exit_code == 0, result.stderr
    direct = tmp_path / "direct.cvxq"
    assert cvxq(*common, "-o", direct, *SHORT).exit_code == 0
    assert target.read_bytes() == direct.read_bytes()
    said = cvxq(*common, "-o", target, "--statistics", stats, "--seed", 4)
    assert said.exit_code == 6
    assert said.stderr.splitlines()[-1].startswith("cvxq: --seed 4: the statistics were measured ")
    result = cvxq(*common[:-2], "-o", target, "--statistics", stats, "--max-kl", 0.2)
    assert result.exit_code == 0, result.stderr
    assert "--max-kl" in result.stdout
    assert "tried " in result.stderr


def test_measuring_into_a_folder_is_refused(fails: Fails, tmp_path: Path) -> None:
    assert "is a folder" in fails(3, "measure", "model", "-o", tmp_path)


def test_measurements_that_cannot_be(fails: Fails, tmp_path: Path) -> None:
    command = ("measure", tmp_path / "no model", "-o", tmp_path / "out", "--calibration")
    assert "leaves nothing to measure" in fails(2, *command, "none")
    assert "no such file; --calibration takes" in fails(3, *command, tmp_path / "no.txt")


def test_only_what_was_given_is_passed_on(cvxq: Cvxq, monkeypatch: pytest.MonkeyPatch) -> None:
    from cvxq_converter.options import ConversionOptions

    calls: list[tuple[Any, ...]] = []

    def note(*arguments: Any) -> None:
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("cvxq_converter.job.measure_model", note)
    cvxq("measure", "some/model", "-o", "out", "--metric", "logits", "--keep", "*head*")
    model, output, options, *_ = calls[0]
    assert (model, output) == ("some/model", Path("out"))
    assert options == ConversionOptions.of(bits=8, metric="logits", keep=("*head*",))

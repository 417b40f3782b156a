"""`cvxq convert`: what its options become, its report, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result
from cvxq.cli.conversion import Duration, Percentage, Size

Cvxq = Callable[..., Result]
Fails = Callable[..., str]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("123456B", 123456),
        ("12.3MB", 12_300_000),
        ("850kB", 850_000),
        ("1.5 GiB", 3 << 29),
        ("2KiB", 2048),
        ("0.5gb", 500_000_000),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert Size().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["12", "12.3", "MB", "-1MB", "12M", "12IB", "1e3B", ""])
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is not a size such as 12\.3MB"):
        Size().convert(text, None, None)


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5 %", 0.005), (".25%", 0.0025)])
def test_percentages(text: str, share: float) -> None:
    assert Percentage().convert(text, None, None) == pytest.approx(share)


@pytest.mark.parametrize("text", ["1", "0.01", "0%", "-1%", "%", "1e3%", ""])
def test_texts_that_are_no_percentage(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a percentage above 0, such as 1%"):
        Percentage().convert(text, None, None)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5 h", 5400), ("30M", 1800)])
def test_durations(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["30", "0m", "-1m", "m", "5 min", "1e3s", ""])
def test_texts_that_are_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a time such as 30m; give a number and s"):
        Duration().convert(text, None, None)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, cvxq: Cvxq) -> Callable[..., tuple[Any, ...]]:
    """Return a function that gives the arguments with which the converter would be called."""
    calls: list[tuple[Any, ...]] = []

    def note(*arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("cvxq.cli.convert._converter", lambda: note)

    def run(*options: object) -> tuple[Any, ...]:
        assert cvxq("convert", "some/model", "-o", "out.cvxq", *options).exit_code == 130
        return calls.pop()

    return run


def test_options_that_are_not_given_keep_the_converters_defaults(
    taken: Callable[..., tuple[Any, ...]],
) -> None:
    from cvxq_converter.options import ConversionOptions

    model, output, options, *_ = taken("--bits", 3)
    assert (model, output) == ("some/model", Path("out.cvxq"))
    assert options == ConversionOptions.of(bits=3.0)


def test_every_option_reaches_the_converter(
    taken: Callable[..., tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr("cvxq.cli.conversion.resolve_device", lambda device: device)
    options = taken(
        "--size", "2MB", "--keep", "*embed*", "--keep", "lm_head*", "--calibration", "none",
        "--sequences", 5, "--length", 64, "--seed", 7, "--metric", "logits", "--iterations", 2,
        "--method", "rtn", "--group-size", 32, "--partitions", 4, "--revision", "main",
        "--device", "cuda", "--dtype", "bfloat16",
        "--memory", "8GB", "--disk", "50GB", "--scratch", Path(__file__).parent,
    )[2]  # fmt: skip
    expected = {
        "bits": None,
        "size_bytes": 2_000_000,
        "keep": ("*embed*", "lm_head*"),
        "calibration": "none",
        "sequences": 5,
        "length": 64,
        "seed": 7,
        "metric": "logits",
        "iterations": 2,
        "method": "rtn",
        "group_size": 32,
        "partitions": 4,
        "revision": "main",
        "device": "cuda",
        "dtype": torch.bfloat16,
        "memory": 8 * 10**9,
        "disk": 50 * 10**9,
        "scratch": Path(__file__).parent,
    }
    records = (options.target, options.calibration, options.method, options.place)
    found = {name: value for record in records for name, value in vars(record).items()}
    found["calibration"], found["method"] = options.calibration.source, options.method.name
    assert {name: found[name] for name in expected} == expected
    assert taken("--bits", 3, "--time", "30m")[2].calibration.time == 1800.0


def test_use_that_cannot_be_right(fails: Fails, tmp_path: Path) -> None:
    target = tmp_path / "out.cvxq"
    targets = (("--bits", 3), ("--size", "1MB"), ("--max-kl", 0.1))
    targets += (("--max-perplexity-increase", "1%"),)
    expected = "give exactly one of --bits, --size, --max-kl and --max-perplexity-increase"
    for given in ((), *combinations(targets, 2), targets):
        words = [word for target_words in given for word in target_words]
        assert expected in fails(2, "convert", "model", "-o", target, *words)
    assert "Missing option '--output'" in fails(2, "convert", "model", "--bits", 3)
    assert "is not a size" in fails(2, "convert", "model", "-o", target, "--size", "big")
    assert "allowed 0 to 8" in fails(2, "convert", "model", "-o", target, "--bits", 9)
    assert "numbers above 0" in fails(2, "convert", "model", "-o", target, "--max-kl", 0)
    tune = ("--bits", 3, "--tune", 5, "--calibration", "none")
    assert "--tune needs calibration" in fails(2, "convert", "model", "-o", target, *tune)
    scratch = ("--bits", 3, "--scratch", tmp_path / "none")
    assert "does not exist" in fails(2, "convert", "model", "-o", target, *scratch)
    assert "is a folder" in fails(3, "convert", "model", "-o", tmp_path, "--bits", 3)
    assert "no such folder" in fails(3, "convert", "./nothing", "-o", target, "--bits", 3)
    nowhere = tmp_path / "none" / "out.cvxq"
    assert "create it first" in fails(3, "convert", "model", "-o", nowhere, "--bits", 3)
    bits = ("convert", "model", "-o", target, "--bits", 3)
    assert "is a file" in fails(3, *bits, "--report", Path(__file__))
    assert "does not exist, expected a file that cvxq measure wrote" in fails(
        3, *bits, "--statistics", tmp_path / "none"
    )
    assert "not a measurement" in fails(6, *bits, "--statistics", Path(__file__))


def test_model_that_is_none(fails: Fails, tmp_path: Path) -> None:
    target = tmp_path / "out.cvxq"
    folder = tmp_path / "empty"
    folder.mkdir()
    assert str(folder.name) in fails(6, "convert", folder, "-o", target, "--bits", 3)
    assert not target.exists()


@pytest.mark.slow
def test_a_conversion_from_folder_to_text(
    cvxq: Cvxq, original_folder: tuple[Path, Path], tmp_path: Path
) -> None:
    _, folder = original_folder
    target, report = tmp_path / "out.cvxq", tmp_path / "report"
    result = cvxq(
        "convert", folder, "-o", target, "--bits", 6, "--calibration", "none",
        "--group-size", 16, "--report", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "bits per weight" in result.stdout
    assert "of memory" in result.stderr.splitlines()[0]  # the estimate comes first
    record = json.loads((report / "report.json").read_text())
    assert record["file_bytes"] == target.stat().st_size
    heading = f"<h1>original at {record['rate_bits_per_weight']:.3f} bits"
    assert heading in (report / "index.html").read_text()
    inspected = json.loads(cvxq("inspect", target, "--json").stdout)
    assert inspected["rate_bits_per_weight"] == pytest.approx(record["rate_bits_per_weight"])
    assert inspected["rate_bits_per_weight"] == pytest.approx(6, rel=0.005)
    assert inspected["provenance"] is not None
    assert cvxq("verify", target).exit_code == 0
    assert cvxq("generate", target, "Once", "--max-tokens", 4).exit_code == 0

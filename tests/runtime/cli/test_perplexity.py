"""`cvxq perplexity`: figures equal to those of `cvxq.evaluate`, also against an original."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

Cvxq = Callable[..., Result]
TEXT = "Once upon a time there was a test. It had no end, but many windows! " * 4


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def record_of(result: Result) -> dict[str, object]:
    assert result.exit_code == 0, result.stderr
    record: dict[str, object] = json.loads(result.stdout)
    return record


# How far products in int8 may move a figure: a twentieth of the quantization error, whose effect
# on these random networks is a few hundredths.
FAST = 5e-3


@pytest.mark.parametrize(("weights", "tolerance"), [("dense", 1e-5), ("packed", FAST)])
def test_perplexity_is_that_of_a_plain_loop(
    cvxq: Cvxq,
    original_folder: tuple[Path, Path],
    text_file: Path,
    weights: str,
    tolerance: float,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, folder = original_folder
    options = ("--text", text_file, "--context", 32, "--weights", weights, "--json")
    record = record_of(cvxq("perplexity", path, *options))
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    for start in range(0, len(ids) - 31, 32):
        window = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            logits = network(window).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none"))
    nll = torch.cat(losses)
    assert record["tokens"] == len(nll)
    assert record["windows"] == len(ids) // 32
    assert record["nll"]["mean"] == pytest.approx(float(nll.mean()), rel=tolerance)  # type: ignore[index]
    error = float(nll.std()) / math.sqrt(len(nll))
    assert record["nll"]["standard_error"] == pytest.approx(error, rel=10 * tolerance)  # type: ignore[index]
    assert record["perplexity"]["mean"] == pytest.approx(math.exp(nll.mean()), rel=tolerance)  # type: ignore[index]


def test_folder_and_file_of_the_same_weights_agree(
    cvxq: Cvxq, original_folder: tuple[Path, Path], text_file: Path
) -> None:
    path, folder = original_folder
    common = ("--text", text_file, "--context", 24, "--stride", 16, "--json")
    ours = record_of(cvxq("perplexity", path, *common, "--weights", "dense"))
    theirs = record_of(cvxq("perplexity", folder, *common))
    assert ours["stride"] == 16
    assert ours["tokens"] == theirs["tokens"]
    assert ours["nll"]["mean"] == pytest.approx(theirs["nll"]["mean"], rel=1e-5)  # type: ignore[index]
    assert "rate_bits_per_weight" in ours
    assert "rate_bits_per_weight" not in theirs  # a folder has no such rate


def test_against_the_same_weights_there_is_no_divergence(
    cvxq: Cvxq, original_folder: tuple[Path, Path], text_file: Path
) -> None:
    path, folder = original_folder
    common = ("perplexity", path, "--text", text_file, "--against", folder, "--weights", "dense")
    record = record_of(cvxq(*common, "--json"))
    for key in ("kl_median", "kl_p90", "kl_p99"):
        assert record[key] == pytest.approx(0, abs=1e-6)
    assert record["kl"]["mean"] == pytest.approx(0, abs=1e-6)  # type: ignore[index]
    assert record["same_top"]["mean"] == 1  # type: ignore[index]
    assert record["context"] == 64
    assert record["file_bytes"] == path.stat().st_size
    shown = cvxq(*common)
    assert shown.exit_code == 0
    for text in (
        "bits per weight all-in",
        "bits per parameter",
        "KL mean",
        "KL median",
        "KL 90th",
        "KL 99th",
        "same likeliest token",
        "original perplexity",
        "±",
    ):
        assert text in shown.stdout, text
    assert "evaluate: " in shown.stderr


def test_against_another_model_there_is(
    cvxq: Cvxq, model_file: Path, chat_file: Path, text_file: Path
) -> None:
    record = record_of(
        cvxq("perplexity", model_file, "--text", text_file, "--against", chat_file, "--json")
    )
    assert record["kl"]["mean"] > 0.01  # type: ignore[index]
    assert 0 < record["kl_median"] <= record["kl_p90"] <= record["kl_p99"]  # type: ignore[operator]
    assert record["same_top"]["mean"] < 1  # type: ignore[index]


@pytest.fixture
def start_file(make_file: Callable[..., Any], plain_tokenizer: dict[str, bytes]) -> Path:
    """A model whose tokenizer puts `<s>`, token 1, before every text."""
    from tokenizers import Tokenizer, processors

    core = Tokenizer.from_str(plain_tokenizer["tokenizer.json"].decode())
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    files = {**plain_tokenizer, "tokenizer.json": core.to_str().encode()}
    path: Path = make_file("llama", name="start.cvxq", files=files).path
    return path


def test_every_window_begins_with_the_start_token(
    cvxq: Cvxq, start_file: Path, model_file: Path, text_file: Path
) -> None:
    def measured(path: Path, *options: object) -> Any:
        command = ("perplexity", path, "--text", text_file, "--context", 32, *options)
        record = record_of(cvxq(*command, "--json"))
        assert record["start_token"] in ("every window", "text", "none")
        return record

    everywhere = measured(start_file)
    assert everywhere["start_token"] == "every window"
    assert everywhere["windows"] == len(TEXT) // 31
    assert everywhere["tokens"] == everywhere["windows"] * 31  # each token of the text
    assert everywhere["stride"] == 31
    once = measured(start_file, "--no-bos")
    assert once["start_token"] == "text"
    assert once["tokens"] == once["windows"] * 31 == (len(TEXT) + 1) // 32 * 31
    assert once["nll"] != everywhere["nll"]
    assert measured(model_file)["start_token"] == "none"
    shown = cvxq("perplexity", start_file, "--text", text_file)
    assert "each beginning with the start token" in shown.stdout


def test_a_long_text_can_be_cut(cvxq: Cvxq, start_file: Path, text_file: Path) -> None:
    common = ("perplexity", start_file, "--context", 32, "--windows", 2)
    few = record_of(cvxq(*common, "--text", text_file, "--json"))
    assert (few["windows"], few["windows_in_text"]) == (2, len(TEXT) // 31)
    assert "in 2 of 8 windows of 32" in cvxq(*common, "--text", text_file).stdout
    text_file.write_text(TEXT[:62])
    assert record_of(cvxq(*common, "--text", text_file, "--json"))["nll"] == few["nll"]


def test_marks_and_line_breaks_of_windows_change_nothing(
    cvxq: Cvxq, model_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "lines.txt"
    found = []
    for data in (b"One line,\nanother.\n", b"\xef\xbb\xbfOne line,\r\nanother.\r\n"):
        text.write_bytes(data)
        found.append(record_of(cvxq("perplexity", model_file, "--text", text, "--json"))["nll"])
    assert found[0] == found[1]


def test_what_cannot_be_measured(
    fails: Callable[..., str], model_file: Path, text_file: Path, tmp_path: Path
) -> None:
    def line(code: int, *options: object) -> str:
        return fails(code, "perplexity", model_file, *options)

    assert "Missing option '--text'" in line(2)
    assert "does not exist, expected a text file" in line(3, "--text", tmp_path / "no.txt")
    assert "is a folder" in line(3, "--text", tmp_path)
    assert "allowed: 2 to the model's 64" in line(2, "--text", text_file, "--context", 65)
    assert "stride is 33" in line(2, "--text", text_file, "--context", 32, "--stride", 33)
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"abc\xe9")
    assert "byte 3 is not UTF-8" in line(3, "--text", broken)
    short = tmp_path / "short.txt"
    short.write_text("a")
    assert "1 tokens, at least 2" in line(3, "--text", short)

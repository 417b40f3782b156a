"""`cvxq verify --deep`: a record that computes something else, and figures that are not true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cvxq_format import CompandedEntry, Reader, Writer

Cvxq = Callable[..., Result]
Change = Callable[[dict[str, Any]], object]


def rewrite(path: Path, target: Path, changes: dict[str, Change]) -> Path:
    """Write a file again with some of its JSON documents changed, every checksum right."""
    with Reader(path) as reader:
        books = [reader.codebook(i) for i in range(len(reader.header.codebooks))]
        with Writer(target, codebooks=books) as writer:
            for name in reader.names:
                added = name in reader.added_biases
                if isinstance(reader.entry(name), CompandedEntry):
                    writer.add_companded(name, reader.read(name))  # type: ignore[arg-type]
                else:
                    value = reader.read(name).to_float32()  # type: ignore[union-attr]
                    writer.add_raw(name, value.reshape(reader.entry(name).shape), added_bias=added)
            for alias, name in reader.aliases.items():
                writer.add_alias(alias, name)
            for name in reader.files:
                data = reader.file(name)
                if name in changes:
                    document = json.loads(data)
                    changes[name](document)
                    data = json.dumps(document).encode()
                writer.add_file(name, data)
    return target


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A conversion of a tiny network calibrated on its own text, and its folder."""
    from cvxq_converter.job import convert
    from cvxq_converter.options import ConversionOptions
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    limits = {"max_position_embeddings": 64, "sliding_window": 8}
    network = MistralForCausalLM(MistralConfig(**sizes, **heads, **limits, head_dim=8))
    folder = tmp_path_factory.mktemp("deep")
    network.save_pretrained(folder / "model")
    options = ConversionOptions.of(bits=3.0, group_size=16, sequences=8, length=24)
    convert(str(folder / "model"), folder / "model.cvxq", options)
    return folder / "model.cvxq", folder / "model"


def checks(result: Result) -> dict[str, bool | None]:
    return {check["name"]: check["holds"] for check in json.loads(result.stdout)["checks"]}


def test_a_true_file(cvxq: Cvxq, converted: tuple[Path, Path]) -> None:
    file, folder = converted
    result = cvxq("verify", file, "--deep", "--against", folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert checks(result) == dict.fromkeys(
        ("record", "source", "calibration", "KL", "perplexity increase"), True
    )


def test_a_file_that_was_calibrated_on_a_text(
    cvxq: Cvxq, converted: tuple[Path, Path], plain_tokenizer: dict[str, bytes], tmp_path: Path
) -> None:
    from cvxq_converter.job import convert
    from cvxq_converter.options import ConversionOptions

    folder = Path(shutil.copytree(converted[1], tmp_path / "model"))
    for name, data in plain_tokenizer.items():
        (folder / name).write_bytes(data)
    text, file = tmp_path / "text.txt", tmp_path / "model.cvxq"
    text.write_text("The old house stood at the end of the lane. " * 40)
    given = {"sequences": 8, "length": 24, "calibration": str(text)}
    convert(str(folder), file, ConversionOptions.of(bits=3.0, group_size=16, **given))
    command = ("verify", file, "--deep", "--against", folder, "--text", text, "--json")
    result = cvxq(*command)
    assert result.exit_code == 0, result.stderr
    assert checks(result)["calibration"] is checks(result)["KL"] is True
    text.write_text("Nobody had lived there for years, as far as we know. " * 40)
    result = cvxq(*command)
    assert result.exit_code == 4
    assert checks(result)["calibration"] is False


@pytest.mark.parametrize(
    ("document", "change", "wrong"),
    [
        ("report.json", lambda d: d.update(kl=d["kl"] / 10 + 1), "KL"),
        ("report.json", lambda d: d.update(perplexity_increase=-0.5), "perplexity increase"),
        ("provenance.json", lambda d: d.update(source_sha256="0" * 64), "source"),
        ("provenance.json", lambda d: d.update(calibration_sha256="0" * 64), "calibration"),
        ("provenance.json", lambda d: d["options"].update(seed=7), "calibration"),
    ],
)
def test_a_false_claim(
    cvxq: Cvxq,
    converted: tuple[Path, Path],
    tmp_path: Path,
    document: str,
    change: Change,
    wrong: str,
) -> None:
    file = rewrite(converted[0], tmp_path / "false.cvxq", {document: change})
    assert cvxq("verify", file).exit_code == 0
    result = cvxq("verify", file, "--deep", "--against", converted[1], "--json")
    assert result.exit_code == 4
    assert checks(result)[wrong] is False
    assert f"is not what it claims: {wrong}" in result.stderr


def test_a_record_that_computes_something_else(
    cvxq: Cvxq, converted: tuple[Path, Path], tmp_path: Path
) -> None:
    def widen(record: dict[str, Any]) -> None:
        record["layers"][0]["attention"]["window"] += 4

    file = rewrite(converted[0], tmp_path / "false.cvxq", {"decoder.json": widen})
    result = cvxq("verify", file, "--deep")
    assert result.exit_code == 4
    assert "record: WRONG, logits differ from those of transformers" in result.stdout


def test_other_versions_are_told_apart_from_a_false_digest(
    cvxq: Cvxq, converted: tuple[Path, Path], tmp_path: Path
) -> None:
    def older(provenance: dict[str, Any]) -> None:
        provenance["versions"]["torch"] = "1.0"
        provenance["calibration_sha256"] = "0" * 64

    file = rewrite(converted[0], tmp_path / "older.cvxq", {"provenance.json": older})
    result = cvxq("verify", file, "--deep", "--against", converted[1], "--json")
    assert result.exit_code == 0, result.stderr
    assert checks(result)["calibration"] is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["options"].update(calibration="wiki.txt"), "give that text with --text"),
        (lambda d: d["options"].update(colour="red"), "options that this version does not know"),
        (lambda d: d["options"].update(sequences=10**9), "tokens, allowed 4194304 altogether"),
        (lambda d: d.pop("options"), "it claims nothing of its model"),
    ],
)
def test_a_provenance_that_cannot_be_followed(
    converted: tuple[Path, Path],
    tmp_path: Path,
    change: Change,
    told: str,
    cvxq: Cvxq,
) -> None:
    file = rewrite(converted[0], tmp_path / "odd.cvxq", {"provenance.json": change})
    result = cvxq("verify", file, "--deep", "--against", converted[1])
    assert result.exit_code == 6
    assert told in result.stderr.splitlines()[-1]


def test_options_that_do_not_go_together(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "give both" in fails(2, "verify", "x.cvxq", "--against", "model")
    assert "give both" in fails(2, "verify", "x.cvxq", "--deep", "--text", "model")

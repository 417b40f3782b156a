"""`inspect` and `verify` on sound files, and every command on files that are not."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cvxq.summary import KINDS
from cvxq_format import Reader

Cvxq = Callable[..., Result]
Fails = Callable[..., str]
MakeFile = Callable[..., Any]

READERS = ("generate", "chat", "perplexity", "inspect", "verify", "bench")


def arguments(command: str, path: Path, text: Path) -> list[object]:
    """Return a valid use of `command` on `path`."""
    more: dict[str, list[object]] = {"generate": ["Once"], "perplexity": ["--text", text]}
    return [command, path, *more.get(command, [])]


@pytest.fixture
def faulty_vectors() -> Path:
    return Path(__file__).parents[3] / "format_spec" / "vectors" / "faulty"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a test. " * 8, encoding="utf-8")
    return path


def patch_preamble(data: bytes, offset: int, value: bytes) -> bytes:
    """Change bytes of the preamble and mend its checksum, the last 4 of its 128 bytes."""
    head = bytearray(data[:124])
    head[offset : offset + len(value)] = value
    return bytes(head) + struct.pack("<I", zlib.crc32(head)) + data[128:]


def corrupt(path: Path, name: str) -> Path:
    """Copy a file with one bit of tensor `name` flipped."""
    data = bytearray(path.read_bytes())
    with Reader(path) as reader:
        data[reader.entry(name).offset + reader.entry(name).size // 2] ^= 4
    broken = path.with_name("broken.cvxq")
    broken.write_bytes(data)
    return broken


def test_inspect_accounts_for_every_byte(cvxq: Cvxq, model_file: Path) -> None:
    record = json.loads(cvxq("inspect", model_file, "--json").stdout)
    size = model_file.stat().st_size
    assert record["file_bytes"] == size
    assert sum(record["bytes_by_kind"].values()) == size
    assert set(record["bytes_by_kind"]) == set(KINDS)  # the fixture has a bit of everything
    with Reader(model_file) as reader:
        payloads = {n: reader.entry(n).size for n in reader.names}
        padding = sum(section.padding for section in reader.sections())
        files = {s.name: s.size for s in reader.sections() if s.kind == "file"}
        originals = {name: len(reader.file(name)) for name in reader.files}
    assert record["bytes_by_kind"]["padding"] == padding
    assert record["carried_files"] == files
    assert record["carried_files_original"] == originals
    for matrix in record["matrices"]:
        assert matrix["payload_bytes"] == payloads[matrix["name"]]
        rows, columns = matrix["shape"]
        assert sum(matrix["depth_histogram"]) == rows * columns
    kinds = record["bytes_by_kind"]
    side = ("depths", "scales", "means", "permutation", "row_scales")
    blocks = kinds["codes"] + sum(kinds[kind] for kind in side)
    assert blocks == sum(matrix["payload_bytes"] for matrix in record["matrices"])


def test_inspect_shows_what_deflating_saved(cvxq: Cvxq, make_file: MakeFile) -> None:
    words = json.dumps([f"word {i}" for i in range(2000)]).encode()
    path = make_file("llama", files={"vocab.json": words, "vocab.txt": b"words"}).path
    record = json.loads(cvxq("inspect", path, "--json").stdout)
    assert record["carried_files_original"]["vocab.json"] == len(words)
    stored = record["carried_files"]["vocab.json"]
    assert stored < len(words) / 2
    assert record["carried_files"]["vocab.txt"] == record["carried_files_original"]["vocab.txt"]
    assert sum(record["carried_files"].values()) == record["bytes_by_kind"]["file"]
    shown = cvxq("inspect", path).stdout
    (line,) = [line for line in shown.splitlines() if "vocab.json" in line]
    assert line.split() == f"vocab.json (deflated from {len(words):,}) {stored:,}".split()
    assert "vocab.txt (" not in shown


def test_verify_names_a_file_that_does_not_inflate(
    cvxq: Cvxq, fails: Fails, faulty_vectors: Path
) -> None:
    for name in ("deflated-bomb", "deflated-cut-short", "deflated-checksum"):
        path = faulty_vectors / f"{name}.cvxq"
        assert "tokenizer.json" in fails(4, "verify", path)
        assert "file 'tokenizer.json' at byte 0x3c0: " in cvxq("verify", path).stdout


def test_inspect_counts_weights_and_parameters(cvxq: Cvxq, make_file: MakeFile) -> None:
    made = make_file("llama-tied", add_biases=True)
    record = json.loads(cvxq("inspect", made.path, "--json").stdout)
    own = [p for n, p in made.network.named_parameters() if not n.endswith(".bias")]
    assert record["parameters"] == sum(p.numel() for p in own)
    assert record["companded_weights"] == sum(p.numel() for p in own if p.ndim == 2)
    kinds = record["bytes_by_kind"]
    needed = sum(m["payload_bytes"] for m in record["matrices"])
    needed += kinds["codebook"] + kinds["added_bias"]
    assert record["rate_bits_per_weight"] == 8 * needed / record["companded_weights"]
    assert record["file_bits_per_parameter"] == 8 * record["file_bytes"] / record["parameters"]


def test_depth_histogram_is_that_of_the_depth_map(cvxq: Cvxq, model_file: Path) -> None:
    record = json.loads(cvxq("inspect", model_file, "--json").stdout)
    with Reader(model_file) as reader:
        for matrix in record["matrices"]:
            tensor = reader.read(matrix["name"])
            counts = [0] * 9
            for cluster, rows in enumerate(tensor.cluster_rows()):
                for depth in tensor.depths[0, cluster]:
                    counts[depth] += int(rows)
            assert matrix["depth_histogram"] == counts
            mean = sum(b * n for b, n in enumerate(counts)) / sum(counts)
            assert matrix["mean_depth"] == pytest.approx(mean)
            assert matrix["pruned_share"] == counts[0] / sum(counts)


def test_inspect_for_readers(
    cvxq: Cvxq, make_file: MakeFile, plain_tokenizer: dict[str, bytes]
) -> None:
    extra = {"provenance.json": b'{"source":{"name":"tiny"}}', "report.json": b'{"kl":0.01234567}'}
    made = make_file("llama", files=plain_tokenizer | extra)
    path: Path = made.path
    result = cvxq("inspect", path)
    assert result.exit_code == 0
    assert result.stderr == ""
    for text in (
        f"{path.stat().st_size:,}",
        "bits per weight all-in",
        "model.layers.1.mlp.down_proj.weight",
        "32×48",
        "tokenizer.json",
        "source.name",
        "0.0123457",
        "100.00%",
    ):
        assert text in result.stdout, text


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (b"{}", "runs through transformers: it has no decoder.json"),
        (
            b'{"decoder":{"is_proved":false,"reason":"it is odd"}}',
            "runs through transformers: it is odd",
        ),
    ],
)
def test_inspect_says_why_transformers_runs_a_file(
    cvxq: Cvxq, make_file: MakeFile, report: bytes, text: str
) -> None:
    made = make_file("llama", files={"report.json": report}, with_record=False)
    assert text in cvxq("inspect", made.path).stdout


def test_inspect_says_that_a_record_runs_a_file(cvxq: Cvxq, make_file: MakeFile) -> None:
    made = make_file("llama", files={"decoder.json": b"{}"})
    assert "runs by its own decoders" in cvxq("inspect", made.path).stdout


def test_verify_says_what_it_cost(cvxq: Cvxq, model_file: Path) -> None:
    result = cvxq("verify", model_file)
    assert result.exit_code == 0
    assert "sound" in result.stdout
    assert "GB/s" in result.stdout
    record = json.loads(cvxq("verify", model_file, "--json").stdout)
    assert record["sound"] is True
    assert record["problems"] == []
    assert record["file_bytes"] == model_file.stat().st_size
    rate = record["file_bytes"] / record["seconds"] / 1e9
    assert record["gigabytes_per_second"] == pytest.approx(rate)


def test_verify_names_the_tensor(cvxq: Cvxq, fails: Fails, model_file: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    broken = corrupt(model_file, name)
    assert name in fails(4, "verify", broken)
    result = cvxq("verify", broken, "--json")
    assert result.exit_code == 4
    record = json.loads(result.stdout)
    assert record["sound"] is False
    assert [problem["name"] for problem in record["problems"]] == [name]
    assert name in cvxq("verify", broken).stdout


def test_verify_finds_a_byte_in_the_padding(cvxq: Cvxq, model_file: Path) -> None:
    with Reader(model_file) as reader:
        section = next(s for s in reader.sections() if s.padding)
    data = bytearray(model_file.read_bytes())
    data[section.offset + section.size] = 1
    model_file.write_bytes(data)
    result = cvxq("verify", model_file)
    assert result.exit_code == 4
    assert "padding" in result.stdout


@pytest.mark.parametrize("command", READERS)
def test_missing_file_and_folder(
    fails: Fails, tmp_path: Path, text_file: Path, command: str
) -> None:
    missing = tmp_path / "missing.cvxq"
    line = fails(3, *arguments(command, missing, text_file))
    assert f"{missing} does not exist, expected a .cvxq file" in line
    code, expected = (6, "no config.json") if command == "perplexity" else (3, "is a folder")
    assert expected in fails(code, *arguments(command, tmp_path, text_file))


@pytest.mark.parametrize("command", READERS)
def test_files_that_cannot_be_used(
    fails: Fails, model_file: Path, text_file: Path, command: str
) -> None:
    data = model_file.read_bytes()

    def line(code: int, content: bytes) -> str:
        model_file.write_bytes(content)
        return fails(code, *arguments(command, model_file, text_file))

    assert "cvxq" in line(3, b"GGUF" + bytes(400))
    line(3, b"")
    line(4, data[:-1])
    line(4, data[: len(data) // 2])
    line(4, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    assert "2" in line(5, patch_preamble(data, 8, struct.pack("<H", 2)))


@pytest.mark.parametrize("command", READERS)
def test_corrupt_tensor_is_named(
    fails: Fails, model_file: Path, text_file: Path, command: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = corrupt(model_file, name)
    assert name in fails(4, *arguments(command, broken, text_file))


@pytest.mark.parametrize("command", ["generate", "chat", "perplexity", "bench"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the lean path, the transformers path
def test_a_config_with_a_value_of_the_wrong_type(
    fails: Fails,
    make_file: MakeFile,
    plain_tokenizer: dict[str, bytes],
    text_file: Path,
    kind: str,
    command: str,
) -> None:
    settings = json.loads(make_file(kind).network.config.to_json_string())
    config = {"config.json": json.dumps({**settings, "vocab_size": "many"}).encode()}
    made = make_file(kind, files=plain_tokenizer | config)
    line = fails(4, *arguments(command, made.path, text_file))
    assert f'{made.path}: config.json of the file: vocab_size is "many"; ' in line
    assert "expected int, got str" in line


@pytest.mark.parametrize("command", ["convert", "measure"])
@pytest.mark.parametrize(("field", "value"), [("hidden_size", "big"), ("architectures", 3)])
def test_a_folder_whose_config_has_a_value_of_the_wrong_type(
    fails: Fails,
    original_folder: tuple[Path, Path],
    tmp_path: Path,
    command: str,
    field: str,
    value: object,
) -> None:
    path = original_folder[1] / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, field: value}))
    output = tmp_path / "out"
    more = ["--bits", 3] if command == "convert" else []
    line = fails(6, command, path.parent, "-o", output, *more)
    assert line.startswith("original: ")
    assert not output.exists()


@pytest.mark.parametrize("command", ["generate", "chat", "perplexity", "bench"])
def test_unsupported_architecture(
    fails: Fails,
    make_file: MakeFile,
    plain_tokenizer: dict[str, bytes],
    text_file: Path,
    command: str,
) -> None:
    config = {"config.json": b'{"model_type": "abacus", "architectures": ["Abacus"]}'}
    made = make_file("llama", files=plain_tokenizer | config)
    line = fails(5, *arguments(command, made.path, text_file))
    assert "abacus" in line

"""Golden files: every valid vector decodes to what is written down, every faulty one is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import cvxq_format
import numpy as np
import pytest
from cvxq_format import (
    CompandedTensor,
    Reader,
    Writer,
    compander_levels,
    dequantize,
    dequantize_rows,
    row_scale_factors,
    verify,
)
from cvxq_format.decoder_record import (
    Attention,
    DecoderRecord,
    Experts,
    FeedForward,
    Layer,
    Norm,
    Part,
    Rope,
    Rows,
    parse_record,
)
from cvxq_format.limits import FEATURES, MAX_INFLATED_SIZE, MAX_INFLATION

RECORDS = (DecoderRecord, Layer, Attention, FeedForward, Experts, Part, Rows, Norm, Rope)
LATER = (
    "files-deflated-longer.cvxq",
    "minor-1-without-features.cvxq",
    "minor-2-without-features.cvxq",
    "newer-minor-unknown-key.cvxq",
    "preamble-unused-bytes.cvxq",
)


OTHER_DEFLATE = "zlib-ng" in zlib.ZLIB_RUNTIME_VERSION
"""Whether this Python's zlib deflates to other bytes than that which made the vectors."""


def in_words(default: Any) -> str:
    """Return a default as the document's tables have it."""
    if isinstance(default, bool):
        return str(default).lower()
    words = {dataclasses.MISSING: "", None: "none", (): "empty", 0: "0", 1: "1"}
    return words[default]


def decode(path: Path) -> dict[str, Any]:
    """Return a file's contents in the form of expected.json."""
    with Reader(path) as reader:
        tensors = {}
        for name in reader.names:
            tensor = reader.read(name)
            if isinstance(tensor, CompandedTensor):
                weights = dequantize(tensor, reader.codebook(tensor.codebook))
                found = {"dtype": "f32", "data": weights.astype("<f4").tobytes().hex()}
            else:
                found = {"dtype": tensor.dtype, "data": tensor.data.tobytes().hex()}
            tensors[name] = {"shape": list(tensor.shape), **found}
        files = {name: reader.file(name).hex() for name in reader.files}
        return {"tensors": tensors, "aliases": reader.aliases, "files": files}


def test_valid_vector(valid: Path, valid_name: str, expected: dict[str, Any]) -> None:
    assert decode(valid / valid_name) == expected[valid_name]
    assert verify(valid / valid_name) == []


def test_second_decoder_agrees(
    valid: Path, valid_name: str, expected: dict[str, Any], second_decoder: ModuleType
) -> None:
    assert second_decoder.decode(valid / valid_name) == expected[valid_name]


def test_faulty_vector(faulty: Path, faulty_name: str, expected: dict[str, Any]) -> None:
    path, want = faulty / faulty_name, expected[faulty_name]
    if faulty_name == "padding-not-zero.cvxq":  # only verify reads padding
        decode(path)
    else:
        kind = getattr(cvxq_format, want["error"])
        with pytest.raises(kind, match=re.escape(want["text"])) as caught:
            decode(path)
        assert "\n" not in str(caught.value)
        assert type(caught.value) is kind
    problems = verify(path)
    assert want["text"] in problems[0].message


def test_vectors_are_what_their_script_makes(
    make_vectors: ModuleType, format_spec: Path, tmp_path: Path
) -> None:
    make_vectors.main(tmp_path)
    committed = format_spec / "vectors"
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.*")}
    kept = {p.relative_to(committed): p.read_bytes() for p in committed.rglob("*.*")}
    assert sorted(made) == sorted(kept)
    others = [name.name for name in made if made[name] != kept[name]]
    assert [name for name in others if not (OTHER_DEFLATE and "deflate" in name)] == []


def test_rewriting_gives_the_same_bytes(valid: Path, valid_name: str, tmp_path: Path) -> None:
    if valid_name in LATER:
        pytest.skip("not as our writer would write it")
    if OTHER_DEFLATE and valid_name == "files-deflated.cvxq":
        pytest.skip("another zlib deflates to other bytes")
    copy = tmp_path / "copy.cvxq"
    with Reader(valid / valid_name) as reader:
        books = [reader.codebook(i) for i in range(len(reader.header.codebooks))]
        with Writer(copy, books, reader.header.required, reader.header.optional) as writer:
            for section in reader.sections():
                if section.kind == "file":
                    writer.add_file(section.name, reader.file(section.name))
                elif section.kind == "tensor":
                    tensor = reader.read(section.name)
                    if isinstance(tensor, CompandedTensor):
                        writer.add_companded(section.name, tensor)
                    else:
                        added = section.name in reader.added_biases
                        dtype = tensor.dtype if tensor.dtype == "bf16" else None
                        writer.add_raw(section.name, tensor.data, dtype, added_bias=added)
            for alias, target in reader.aliases.items():
                writer.add_alias(alias, target)
    assert copy.read_bytes() == (valid / valid_name).read_bytes()


def test_vector_of_a_decoder_record(valid: Path, make_vectors: ModuleType) -> None:
    with Reader(valid / "decoder-record.cvxq") as reader:
        record = parse_record(reader.file("decoder.json"))
        named = set(
            re.findall(
                r'"(?:weight|bias|embedding|positions)": "([^"]*)"', json.dumps(record.to_json())
            )
        )
        assert named == {*reader.names, *reader.aliases}
    assert record == make_vectors.tiny_record()


def test_vector_of_a_mixture_of_experts(valid: Path, make_vectors: ModuleType) -> None:
    with Reader(valid / "decoder-experts.cvxq") as reader:
        document = json.loads(reader.file("decoder.json"))
        assert document["version"] == 2
        record = parse_record(reader.file("decoder.json"))
        blocks = {
            name.replace("*", str(index))
            for layer in document["layers"]
            for name in re.findall(r'"(?:weight|bias|sinks)": "([^"]*)"', json.dumps(layer))
            for index in range(layer["feed_forward"]["experts"]["count"])
        }
        assert {*blocks, "embed.weight", "head.weight"} == {*reader.names, *reader.aliases}
    assert record == make_vectors.tiny_mixture()


def test_rows_equal_the_whole(valid: Path, valid_name: str) -> None:
    with Reader(valid / valid_name) as reader:
        for name in reader.names:
            tensor = reader.read(name)
            if not isinstance(tensor, CompandedTensor):
                continue
            book = reader.codebook(tensor.codebook)
            order = np.random.default_rng(0).integers(0, tensor.shape[-2], 2 * tensor.shape[-2])
            for expert in range(tensor.experts):
                whole = dequantize(tensor, book, expert)
                rows = dequantize_rows(tensor, book, order, expert)
                np.testing.assert_array_equal(rows.view("u4"), whole[order].view("u4"))


@pytest.fixture(scope="module")
def text(format_spec: Path) -> str:
    """FORMAT.md, whose numbers must be the program's numbers."""
    return (format_spec / "FORMAT.md").read_text(encoding="utf-8")


def test_document_dump_is_the_vector(text: str, valid: Path) -> None:
    dump = text[text.index("## Appendix B") :]
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+?)(?: {2,}.*)?$", dump, re.M)
    data = bytearray()
    for offset, row in lines:
        assert int(offset, 16) == len(data)
        data += bytes.fromhex(row)
    assert bytes(data) == (valid / "worked-example.cvxq").read_bytes()


def test_document_weights_are_those_of_the_vector(text: str, valid: Path) -> None:
    table = text[text.index("| row | from position") :].splitlines()[2:5]
    rows = [[float(cell) for cell in line.strip("|").split("|")[2:]] for line in table]
    with Reader(valid / "worked-example.cvxq") as reader:
        tensor = reader.read("fc.weight")
        assert isinstance(tensor, CompandedTensor)
        weights = dequantize(tensor, reader.codebook(0))
    np.testing.assert_array_equal(np.array(rows, np.float32), weights)


def test_document_lists_the_default_levels(text: str) -> None:
    part = text[text.index("## Appendix A") : text.index("## Appendix B")]
    block = part.split("```")[1].replace("text", "")
    for depth, numbers in enumerate(re.split(r"B=\d", block)[1:], start=1):
        upper = np.array(numbers.split(), np.float32)
        np.testing.assert_array_equal(compander_levels(depth)[2 ** (depth - 1) :], upper)
        np.testing.assert_array_equal(compander_levels(depth), -compander_levels(depth)[::-1])


def test_document_lists_the_row_scales(text: str) -> None:
    rows = re.findall(r"^\| (\d) \| 0x([0-9A-F]{8}) \| ([0-9.]+) \|$", text, re.M)
    codes, patterns, decimals = zip(*rows, strict=True)
    factors = row_scale_factors(np.array(codes, np.uint8))
    assert codes == ("0", "1", "2", "3")
    assert [f"{pattern:08X}" for pattern in factors.view("u4")] == list(patterns)
    np.testing.assert_array_equal(np.array(decimals, np.float32), factors)
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(row_scale_factors(every), 2.0 ** (-0.25 * every), rtol=2**-24)


def test_document_names_the_features(text: str) -> None:
    table = text[text.index("| feature | since |") :].split("\n\n")[0]
    named = re.findall(r"^\| `([a-z-]+)` \| 1\.(\d+) \|", table, re.M)
    assert {feature: int(minor) for feature, minor in named} == FEATURES


def test_document_names_the_limits_of_files(text: str) -> None:
    assert f"{MAX_INFLATED_SIZE:,}".replace(",", " ") in text
    assert f"≤ {MAX_INFLATION} · `size`" in text


def test_document_describes_the_decoder_record(text: str) -> None:
    """Every field of every record has a row; its default is there if and only if it has one."""
    part = text[text.index("### 16.3") : text.index("## Appendix A")]
    for kind in RECORDS:
        table = part[part.index(f"**`{kind.__name__}`**") :].split("\n| field")[1].split("\n\n")[0]
        rows = [line.strip("|").split(" | ") for line in table.splitlines() if line[:3] == "| `"]
        defaults = {n: row[-1].strip() for row in rows for n in re.findall(r"`(\w+)`", row[0])}
        wanted = {f.name: f.default for f in dataclasses.fields(kind)}
        assert sorted(defaults) == sorted(wanted)
        for name, default in wanted.items():
            assert defaults[name].split(":")[0] == in_words(default), name


def test_document_names_the_checksum(text: str) -> None:
    assert f"0x{zlib.crc32(b'123456789'):08X}" in text

"""Damaged files give a typed error that names what is damaged, never a wrong tensor."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cvxq_format import (
    CompandedEntry,
    CompandedTensor,
    CorruptError,
    FormatError,
    NotCvxqError,
    Reader,
    SectionInfo,
    TruncatedError,
    dequantize,
    verify,
)
from cvxq_format.companded import decode
from hypothesis import given, settings
from hypothesis import strategies as st


def contents(path: Path, check: bool = True) -> dict[str, bytes]:
    """Read everything, as bytes."""
    with Reader(path, check=check) as reader:
        found = {f"file {name!r}": reader.file(name) for name in reader.files}
        for name in reader.names:
            tensor = reader.read(name)
            if isinstance(tensor, CompandedTensor):
                data = dequantize(tensor, reader.codebook(tensor.codebook)).tobytes()
            else:
                data = tensor.data.tobytes()
            found[f"tensor {name!r}"] = data
        return found


@contextmanager
def changed(path: Path, offset: int, mask: int) -> Iterator[None]:
    """Flip bits of one byte in place for a while; rewriting the file each time would be slow."""
    with path.open("r+b", buffering=0) as file:
        original = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([original[0] ^ mask]), offset)
        yield
        os.pwrite(file.fileno(), original, offset)


def owner(sections: list[SectionInfo], offset: int) -> tuple[SectionInfo, bool]:
    """Return the section a byte belongs to, and whether it is the padding behind it."""
    section = [s for s in sections if s.offset <= offset][-1]
    return section, offset >= section.offset + section.size


def test_truncation_at_every_byte(valid: Path, tmp_path: Path) -> None:
    good = (valid / "worked-example.cvxq").read_bytes()
    path = tmp_path / "cut.cvxq"
    path.write_bytes(good)
    for size in reversed(range(len(good))):
        os.truncate(path, size)
        with pytest.raises(NotCvxqError if size == 0 else TruncatedError):
            Reader(path)


def test_flipping_every_byte(valid: Path, tmp_path: Path) -> None:
    """One bit of every byte, the bit changing with the byte, of the smallest complete file."""
    good = (valid / "worked-example.cvxq").read_bytes()
    path = tmp_path / "flipped.cvxq"
    with Reader(valid / "worked-example.cvxq") as reader:
        sections = reader.sections()
    whole = contents(valid / "worked-example.cvxq")
    path.write_bytes(good)
    for offset in range(len(good)):
        section, is_padding = owner(sections, offset)
        with changed(path, offset, 1 << (offset % 8)):
            message = verify(path)[0].message
            assert "\n" not in message
            if is_padding:
                assert "padding" in message, hex(offset)
                assert contents(path) == whole
                continue
            with pytest.raises(FormatError):
                contents(path)
        kind = f"{section.kind} {section.name!r}"
        if section.kind == "preamble":
            kind = "89 43" if offset < 8 else "preamble"
        elif section.kind in ("header", "codebook"):
            kind = f"{section.kind} {section.name}"
        assert kind in message, hex(offset)
    assert path.read_bytes() == good


def test_flipping_every_bit_of_a_payload(valid: Path, tmp_path: Path) -> None:
    path = tmp_path / "flipped.cvxq"
    path.write_bytes((valid / "everything-at-once.cvxq").read_bytes())
    with Reader(path) as reader:
        entry = reader.entry("layer.weight")
    for bit in range(8 * entry.size):
        with (
            changed(path, entry.offset + bit // 8, 1 << (bit % 8)),
            Reader(path) as reader,
            pytest.raises(CorruptError, match=r"tensor 'layer\.weight'"),
        ):
            reader.read("layer.weight")


@pytest.mark.parametrize("name", ["everything-at-once", "everything-of-1.1"])
def test_unchecked_payload_damage_is_an_error_or_harmless(valid: Path, name: str) -> None:
    """Without checksums any payload still gives an error or finite weights of the right shape."""
    path = valid / f"{name}.cvxq"
    with Reader(path) as reader:
        entry = reader.entry("layer.weight")
        assert isinstance(entry, CompandedEntry)
        codebook = reader.codebook(entry.codebook)
    payload = bytearray(path.read_bytes()[entry.offset : entry.offset + entry.size])
    tensor = decode(entry, bytes(payload), codebook)
    side = 8 * (entry.size - tensor.packed_codes.size)
    chosen = [*range(side), *range(side, 8 * entry.size, 13)]  # one code is like another
    refused = 0
    for bit in chosen:
        payload[bit // 8] ^= 1 << (bit % 8)
        try:
            tensor = decode(entry, bytes(payload), codebook)
        except CorruptError:
            refused += 1
        else:
            weights = dequantize(tensor, codebook)
            assert weights.shape == entry.shape
            assert np.isfinite(weights).all()
        payload[bit // 8] ^= 1 << (bit % 8)
    assert 0 < refused < len(chosen)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_resealed_header_damage(
    make_vectors: ModuleType, valid: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Header bytes changed under a right checksum: a FormatError, or a file that still reads."""
    folder = tmp_path_factory.getbasetemp()
    name = data.draw(st.sampled_from(["worked-example", "files-deflated"]))
    draft = make_vectors.Draft((valid / f"{name}.cvxq").read_bytes())
    text = bytearray(draft.seal()[len(draft.body) :])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.one_of(st.binary(max_size=2), st.sampled_from([b"0", b"9999999", b"-", b'"', b"[["]))
        )
    path = folder / "damaged.cvxq"
    path.write_bytes(draft.seal(bytes(text)))
    problems = verify(path)
    assert all("\n" not in problem.message for problem in problems)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=128), st.booleans())
def test_any_preamble(
    valid: Path, tmp_path_factory: pytest.TempPathFactory, start: bytes, sealed: bool
) -> None:
    good = (valid / "worked-example.cvxq").read_bytes()
    data = bytearray(good)
    data[8 : 8 + len(start[:116])] = start[:116]
    if sealed:
        data[124:128] = zlib.crc32(data[:124]).to_bytes(4, "little")
    path = tmp_path_factory.getbasetemp() / "preamble.cvxq"
    path.write_bytes(data)
    if bytes(data) == good or bytes(data[:108]) + bytes(16) == good[:124]:
        return
    with pytest.raises(FormatError):
        contents(path)

"""Damaged files give a typed error that names what is damaged, never a wrong tensor."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cvxq_format import (
    CompandedTensor,
    FormatError,
    NotCvxqError,
    Reader,
    SectionInfo,
    TruncatedError,
    dequantize,
    verify,
)
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


def owner(sections: list[SectionInfo], offset: int) -> tuple[SectionInfo, bool]:
    """Return the section a byte belongs to, and whether it is the padding behind it."""
    section = [s for s in sections if s.offset <= offset][-1]
    return section, offset >= section.offset + section.size


def test_truncation_at_every_byte(valid: Path, tmp_path: Path) -> None:
    good = (valid / "worked-example.cvxq").read_bytes()
    path = tmp_path / "cut.cvxq"
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(NotCvxqError if size == 0 else TruncatedError):
            Reader(path)


def test_flipping_every_byte(valid: Path, tmp_path: Path) -> None:
    """One bit of every byte, the bit changing with the byte, of the smallest complete file."""
    good = (valid / "worked-example.cvxq").read_bytes()
    path = tmp_path / "flipped.cvxq"
    with Reader(valid / "worked-example.cvxq") as reader:
        sections = reader.sections()
    whole = contents(valid / "worked-example.cvxq")
    for offset in range(len(good)):
        data = bytearray(good)
        data[offset] ^= 1 << (offset % 8)
        path.write_bytes(data)
        section, is_padding = owner(sections, offset)
        problems = verify(path)
        assert len(problems) >= 1, hex(offset)
        message = problems[0].message
        assert "\n" not in message
        if is_padding:
            assert problems[0].kind == "padding"
            assert contents(path) == whole
            continue
        with pytest.raises(FormatError):
            contents(path)
        if section.kind == "preamble":
            kind = "89 43" if offset < 8 else "preamble"
        elif section.kind == "header":
            kind = "header"
        elif section.kind == "codebook":
            kind = "codebook 0"
        else:
            kind = f"{section.kind} {section.name!r}"
        assert kind in message, hex(offset)


def test_flipping_every_bit_of_a_payload(valid: Path, tmp_path: Path) -> None:
    path = tmp_path / "flipped.cvxq"
    good = (valid / "everything-at-once.cvxq").read_bytes()
    with Reader(valid / "everything-at-once.cvxq") as reader:
        entry = reader.entry("layer.weight")
    for bit in range(8 * entry.size):
        data = bytearray(good)
        data[entry.offset + bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        with Reader(path) as reader, pytest.raises(FormatError, match=r"tensor 'layer\.weight'"):
            reader.read("layer.weight")


def test_unchecked_payload_damage_is_an_error_or_harmless(valid: Path, tmp_path: Path) -> None:
    """Without checksums any payload still gives a FormatError or finite weights of right shape."""
    path = tmp_path / "flipped.cvxq"
    good = (valid / "everything-at-once.cvxq").read_bytes()
    with Reader(valid / "everything-at-once.cvxq") as reader:
        entry = reader.entry("layer.weight")
    refused = 0
    for bit in range(8 * entry.size):
        data = bytearray(good)
        data[entry.offset + bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        try:
            with Reader(path, check=False) as reader:
                tensor = reader.read("layer.weight")
                assert isinstance(tensor, CompandedTensor)
                weights = dequantize(tensor, reader.codebook(0))
                assert weights.shape == entry.shape
                assert np.isfinite(weights).all()
        except FormatError:
            refused += 1
    assert 0 < refused < 8 * entry.size


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_resealed_header_damage(
    make_vectors: ModuleType, valid: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Header bytes changed under a right checksum: a FormatError, or a file that still reads."""
    folder = tmp_path_factory.getbasetemp()
    draft = make_vectors.Draft((valid / "worked-example.cvxq").read_bytes())
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


@settings(max_examples=300, deadline=None, derandomize=True)
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

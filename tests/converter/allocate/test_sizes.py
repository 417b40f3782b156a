"""How many bytes of codes a target leaves, and how large a file is before it is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cvxq_converter.write.writing as writing
import numpy as np
import pytest
import torch
from cvxq_converter.allocate.allocation import Worths, free_worths
from cvxq_converter.allocate.sizes import (
    allocate_for_rate,
    allocate_for_size,
    file_size,
    make_ledger,
)
from cvxq_converter.errors import RateError
from cvxq_converter.job import Outcome, _plans, convert, finish, prepare, quantize_prepared
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import preflight
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import load_model
from cvxq_converter.stages import Stages
from cvxq_format import Codebook, CompandedEntry, CompandedTensor, Header, Reader, Writer
from cvxq_format.files import SMALLEST_DEFLATED
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

ROWS = np.full(16, 64)
VOCABULARY = 96
UNKNOWN = f"token-{0:040}"


def worths(seed: int, columns: int = 40) -> Worths:
    """Two thousand bytes per bit of mean depth and more: 16 clusters of 64 rows."""
    return free_worths(np.random.default_rng(seed).normal(0, 1, (16, columns)), ROWS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 32), st.floats(0.5, 7.9), st.integers(0, 900))
def test_codes_and_side_information_together_never_exceed_the_rate(
    seed: int, bits: float, side_bytes: int
) -> None:
    both = [worths(seed), worths(seed + 1)]
    weights = 2 * 16 * 64 * 40
    found = allocate_for_rate(both, bits, weights, side_bytes)
    allowed = bits * weights / 8  # bytes: a rate computed from them could round to above `bits`
    assert 0.995 * allowed <= found.code_bytes + side_bytes <= allowed


def test_a_rate_below_the_side_information_names_what_it_takes() -> None:
    with pytest.raises(RateError, match=r"^--bits 1: .* takes 2\.00 bits .* --group-size$"):
        allocate_for_rate([worths(0)], 1.0, weights=400, side_bytes=100)


def header_of(path: Path) -> tuple[Header, int]:
    """The header of a file, places and checksums forgotten, and the digits of these checksums
    that ten for each would exceed theirs by."""
    with Reader(path) as reader:
        header = reader.header
    entries = [*header.codebooks, *header.files, *header.tensors]
    missing = sum(10 - len(str(entry.crc32)) for entry in entries)

    def forget(section: Any) -> Any:
        return replace(section, offset=0, crc32=0)

    return replace(
        header,
        required=(),
        codebooks=tuple(map(forget, header.codebooks)),
        files=tuple(map(forget, header.files)),
        tensors=tuple(map(forget, header.tensors)),
    ), missing


def planned_with(header: Header, side_sizes: Sequence[int]) -> Callable[[Sequence[int]], int]:
    """File size by code sizes, for a header whose first tensors are companded."""

    def planned(code_sizes: Sequence[int]) -> int:
        sizes = [side + codes for side, codes in zip(side_sizes, code_sizes, strict=True)]
        filled = [replace(e, size=s) for e, s in zip(header.tensors, sizes, strict=False)]
        return file_size(replace(header, tensors=(*filled, *header.tensors[len(sizes) :])))

    return planned


@pytest.fixture(scope="module")
def header(
    random_companded: Callable[..., CompandedTensor], tmp_path_factory: pytest.TempPathFactory
) -> Header:
    """Header of a file with two companded tensors, a raw one and a carried file."""
    path = tmp_path_factory.mktemp("sizes") / "a.cvxq"
    with Writer(path, codebooks=[Codebook.default()]) as writer:
        writer.add_file("config.json", b"{}" * 100)
        for i, name in enumerate(("a.weight", "b.weight")):
            writer.add_companded(name, random_companded((48, 20), i))
        writer.add_raw("norm.weight", np.ones(17, np.float32))
    found, missing = header_of(path)
    assert file_size(found) == path.stat().st_size + missing
    return found


@pytest.mark.parametrize("size_bytes", [12_000, 20_011, 31_999])
def test_the_planned_file_fills_the_size_and_never_exceeds_it(
    header: Header, size_bytes: int
) -> None:
    planned = planned_with(header, [900, 1100])
    found = allocate_for_size([worths(1), worths(2)], size_bytes, planned)
    codes = [int(d.sum()) * 8 for d in found.depths]  # 64 rows: 8 bytes a plane
    assert sum(codes) == found.code_bytes
    assert size_bytes - 128 <= planned(codes) <= size_bytes


def test_a_size_below_the_empty_file_names_the_least(header: Header) -> None:
    planned = planned_with(header, [900, 1100])
    least = planned([0, 0])
    both = [worths(1), worths(2)]
    with pytest.raises(
        RateError, match=rf"^--size 1000: .* pruned .* takes {least} bytes; give more$"
    ):
        allocate_for_size(both, 1000, planned)
    assert allocate_for_size(both, least, planned).code_bytes == 0


def test_sizes_settle_however_many_small_matrices_are_aligned(
    random_companded: Callable[..., CompandedTensor], tmp_path: Path
) -> None:
    """Forty matrices of a few bytes each: what alignment takes is as much as the codes."""
    names = [f"layer.{i}.weight" for i in range(40)]
    with Writer(tmp_path / "a.cvxq", codebooks=[Codebook.default()]) as writer:
        for i, name in enumerate(names):
            writer.add_companded(name, random_companded((16, 20), i))
    planned = planned_with(header_of(tmp_path / "a.cvxq")[0], [100] * len(names))
    rng = np.random.default_rng(0)
    small = [free_worths(rng.normal(0, 1, (2, 5)), np.full(2, 8)) for _ in names]
    least = planned([0] * len(names))
    for size_bytes in range(least, least + 3000, 37):
        found = allocate_for_size(small, size_bytes, planned)
        assert planned([int(d.sum()) for d in found.depths]) <= size_bytes


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Return with_tokenizer(folder): a copy of the model, with a tokenizer to deflate."""

    def copy(folder: Path) -> Path:
        target = tmp_path_factory.mktemp("tokenized") / folder.name
        shutil.copytree(folder, target)
        vocabulary = {f"token-{i:040}": i for i in range(VOCABULARY)}
        words = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
        fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN)
        fast.save_pretrained(target)
        assert (target / "tokenizer.json").stat().st_size >= SMALLEST_DEFLATED
        return target

    return copy


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    architecture=st.sampled_from(["llama", "llama-tied", "gpt2", "opt"]),
    bits=st.sampled_from([3.5, 5.0, 7.5]),
    group_size=st.sampled_from([7, 12, 16, 64]),
    partitions=st.sampled_from([1, 8]),
    calibration=st.sampled_from(["none", "self"]),
    means=st.booleans(),
    separable=st.booleans(),
    keeps=st.booleans(),
    tokenized=st.booleans(),
)
@example("llama", 3.5, 16, 8, "none", False, True, False, True)
def test_the_ledger_knows_the_size_of_the_file_to_the_byte(
    save_network: Any, with_tokenizer: Callable[[Path], Path], tmp_path: Path, architecture: str,
    bits: float, group_size: int, partitions: int, calibration: str, means: bool, separable: bool,
    keeps: bool, tokenized: bool,
) -> None:  # fmt: skip
    """Whatever the model and the options; only the checksums' digits are not known beforehand."""
    torch.set_num_threads(1)
    options = ConversionOptions.of(
        bits=bits,
        group_size=group_size,
        partitions=partitions,
        calibration=calibration,
        means=means,
        separable_depths=separable,
        keep=("*.0.*",) if keeps else (),
        sequences=2,
        length=12,
    )
    folder = save_network(architecture)
    source = open_source(str(with_tokenizer(folder) if tokenized else folder))
    stages = Stages(None)
    loaded = load_model(source, options)
    prepared = prepare(loaded, options, preflight(source, options), None, stages)
    plans = _plans(prepared, options)
    result = quantize_prepared(prepared, options, stages)
    path = tmp_path / "a.cvxq"
    finish(prepared, Outcome(result), path, options, stages)
    with Reader(path) as reader:
        documents = {n: reader.file(n) for n in ("provenance.json", "report.json")}
        deflated = [e.name for e in reader.header.files if e.inflated_size is not None]
        sizes = [e.size for e in reader.header.tensors if isinstance(e, CompandedEntry)]
    assert all(len(data) < SMALLEST_DEFLATED for data in documents.values())
    assert deflated == (["tokenizer.json"] if tokenized else [])
    gained = [m for m in loaded.matrices if m.bias_name in result.added_biases]
    ledger = make_ledger(loaded, plans, gained, documents, options.method)
    sides = [entry.size for entry in ledger.header.tensors[: len(plans)]]
    codes = [size - side for size, side in zip(sizes, sides, strict=True)]
    assert [t.packed_codes.size for t in result.tensors.values()] == codes
    assert result.allocation is not None
    computed = ledger.file_bytes(codes, result.allocation.stored_depths)
    written, missing = header_of(path)
    names = [e.name for e in written.tensors]
    assert [e.name for e in ledger.header.tensors] == names
    halves = {e.name: e.dtype for e in written.tensors if e.name in result.added_biases}
    narrower = sum(len("bf16") - len(dtype) for dtype in halves.values())
    assert computed == path.stat().st_size + missing + narrower


def test_a_size_is_met_without_writing_anything_else(
    save_network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file is opened for writing: no trial file is written to learn its size."""
    opened: list[Path] = []

    class Spy(Writer):
        def __init__(self, path: Any, *args: Any, **options: Any) -> None:
            opened.append(Path(path))
            super().__init__(path, *args, **options)

    monkeypatch.setattr(writing, "Writer", Spy)
    path = tmp_path / "a.cvxq"
    options = ConversionOptions.of(size_bytes=24_000, calibration="none", group_size=16)
    convert(str(save_network("llama")), path, options)
    assert opened == [path]
    assert 23_500 <= path.stat().st_size <= 24_000

"""Round trips, and the reader against a reference written straight from the formulas."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cvxq_format import (
    Codebook,
    CompandedTensor,
    Geometry,
    Layout,
    Reader,
    WriteError,
    Writer,
    depth_histogram,
    dequantize,
    pack_codes,
    unpack_codes,
    unpack_column,
    unpack_rows,
)
from cvxq_format.bits import pack_bits, stream_size, unpack_bits
from cvxq_format.codebook import codebook_size
from cvxq_format.companded import encode
from format_strategies import CODEBOOKS, tensors  # type: ignore[import-not-found]
from hypothesis import given, settings
from hypothesis import strategies as st

quickly = settings(max_examples=60, deadline=None, derandomize=True)


def reference_stream(values: list[int], width: int) -> bytes:
    whole = sum(value << (i * width) for i, value in enumerate(values))
    return whole.to_bytes((len(values) * width + 7) // 8, "little")


@quickly
@given(st.integers(0, 56), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_bit_streams(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << width, count, dtype=np.uint64)
    stream = pack_bits(values, width)
    assert stream.tobytes() == reference_stream([int(v) for v in values], width)
    assert stream.size == stream_size(count, width)
    np.testing.assert_array_equal(unpack_bits(stream, count, width), values)


def test_bit_stream_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        pack_bits(np.array([8]), 3)
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        pack_bits(np.array([-1]), 3)
    with pytest.raises(ValueError, match="spare bits"):
        unpack_bits(np.array([0b1000], np.uint8), 1, 3)
    with pytest.raises(ValueError, match="2 expected"):
        unpack_bits(np.zeros(1, np.uint8), 3, 3)


def reference_planes(codes: np.ndarray, tensor: CompandedTensor) -> bytes:
    planes = []
    starts = tensor.geometry.cluster_starts()
    for e in range(tensor.experts):
        for c in range(tensor.clusters):
            for k in range(tensor.columns):
                group = codes[e, starts[c] : starts[c + 1], k]
                for b in range(tensor.depths[e, c, k]):
                    planes.append(np.packbits(group >> b & 1, bitorder="little").tobytes())
    return b"".join(planes)


@quickly
@given(tensors())
def test_codes_round_trip(drawn: tuple[CompandedTensor, np.ndarray]) -> None:
    tensor, codes = drawn
    assert tensor.packed_codes.tobytes() == reference_planes(codes, tensor)
    whole = unpack_codes(tensor).reshape(codes.shape)
    np.testing.assert_array_equal(whole, codes)
    starts = tensor.geometry.cluster_starts()
    some = slice(tensor.clusters // 3, tensor.clusters)
    for e in range(tensor.experts):
        part = unpack_codes(tensor, expert=e, clusters=some)
        np.testing.assert_array_equal(part, codes[e, starts[some.start] :])
        every = np.arange(tensor.rows)[::-1]
        np.testing.assert_array_equal(unpack_rows(tensor, every, e), codes[e, every])
        last = tensor.columns - 1
        np.testing.assert_array_equal(unpack_column(tensor, last, e), codes[e, :, last])


@quickly
@given(tensors())
def test_depth_histogram_counts_weights(drawn: tuple[CompandedTensor, np.ndarray]) -> None:
    tensor, _ = drawn
    of_weights = np.repeat(tensor.depths, tensor.cluster_rows(), axis=1)
    expected = np.bincount(of_weights.ravel(), minlength=9)
    found = depth_histogram(tensor.depths, tensor.cluster_rows())
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)
    experts = [depth_histogram(depths, tensor.cluster_rows()) for depths in tensor.depths]
    np.testing.assert_array_equal(np.sum(experts, axis=0), expected)


@quickly
@given(tensors(), st.sets(st.integers(1, 8)))
def test_file_round_trip(drawn: tuple[CompandedTensor, np.ndarray], stored: set[int]) -> None:
    tensor, _ = drawn
    book = codebook_storing(stored, CODEBOOKS[tensor.scale_bits])
    geometry = Geometry.of(tensor.shape, tensor.group_size, tensor.partitions, tensor.transposed)
    layout = Layout(
        geometry=geometry,
        scale_bits=tensor.scale_bits,
        column_bits=tensor.column_bits,
        separable=tensor.is_separable,
        means=tensor.mean_codes is not None,
        permuted=tensor.permutation is not None,
        cluster_map=tensor.cluster_map,
        row_scale_bits=tensor.row_scale_bits,
    )
    size = layout.side_bytes + int(geometry.code_sizes(tensor.depths).sum())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.cvxq"
        with Writer(path, [book]) as writer:
            writer.add_companded("w", tensor)
        with Reader(path) as reader:
            found = reader.read("w")
            again = reader.codebook(0)
            assert reader.entry("w").size == tensor.payload_size == size
            assert reader.header.codebooks[0].size == codebook_size(
                book.scale_bits, book.level_depths
            )
            is_new = len(stored) < 8 or tensor.row_scale_bits > 0 or tensor.has_cluster_map
            assert reader.preamble.version == (1, int(is_new))
            assert bool(reader.header.required) == is_new
    assert isinstance(found, CompandedTensor)
    assert again.stored_depths == book.stored_depths
    np.testing.assert_array_equal(again.flat_levels(), book.flat_levels())
    assert encode(found) == encode(tensor)
    for name in ("depths", "scale_codes", "mean_codes", "column_terms", "row_scale_codes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(tensor, name))
    np.testing.assert_array_equal(found.source_to_stored, tensor.source_to_stored)
    assert found.source_orientation == tensor.source_orientation
    weights = dequantize(found, book)
    assert weights.shape == tensor.shape
    assert np.isfinite(weights).all()
    np.testing.assert_array_equal(weights.view("u4"), reference_weights(drawn, book).view("u4"))


def codebook_storing(stored: set[int], default: Codebook) -> Codebook:
    """Return a codebook whose tables of some depths are stored, and differ from the default."""
    levels = [t * np.float32(1.5) if d in stored else t for d, t in enumerate(default.levels, 1)]
    return replace(default, levels=tuple(levels), stored_depths=tuple(sorted(stored)))


def reference_weights(drawn: tuple[CompandedTensor, np.ndarray], book: Codebook) -> np.ndarray:
    """Section 11 of FORMAT.md for all weights at once, each line one float32 operation."""
    tensor, codes = drawn
    rows = tensor.cluster_rows()

    def per_row(groups: np.ndarray) -> np.ndarray:
        return np.repeat(groups, rows, axis=1)

    depth = per_row(tensor.depths).astype(np.int64)
    tables = np.concatenate([np.zeros(1, np.float32), *book.levels])
    value = tables[(1 << depth) - 1 + codes]
    if tensor.mean_codes is not None:
        mean = tensor.mean_codes.astype(np.float32) * tensor.mean_step
        value = value + per_row(mean)
    scale = tensor.scale_unit * book.scale_table[tensor.scale_codes]
    value = per_row(scale) * value
    stored = np.empty_like(value)
    for e in range(tensor.experts):
        stored[e, tensor.stored_to_source(e)] = value[e]
    if tensor.row_scale_codes is not None:
        quarters = np.array([1, 0.840896428, 0.707106769, 0.594603539], np.float32)
        codes = tensor.row_scale_codes.astype(np.int64)
        factors = (quarters[codes % 4] * 0.5 ** (codes // 4)).astype(np.float32)
        stored = stored * factors[:, :, None]
    w = stored.swapaxes(1, 2) if tensor.transposed else stored
    return np.ascontiguousarray(w.reshape(tensor.shape))


def test_large_matrix_spans_chunks() -> None:
    """More than one chunk along both axes, with widths that no word divides."""
    rng = np.random.default_rng(5)
    for rows, columns, group_size in ((300, 9001, 200), (2100, 1003, 64), (1025, 33, 1024)):
        clusters = -(-rows // group_size)
        depths = rng.integers(0, 9, (1, clusters, columns)).astype(np.uint8)
        deep = np.repeat(depths, group_size, axis=1)[:, :rows].astype(np.int64)
        codes = rng.integers(0, 1 << deep).astype(np.uint8)
        tensor = CompandedTensor(
            shape=(rows, columns),
            group_size=group_size,
            partitions=1,
            scale_unit=np.float32(1),
            depths=depths,
            scale_codes=np.zeros_like(depths),
            packed_codes=pack_codes(codes, depths, group_size, 1),
        )
        np.testing.assert_array_equal(unpack_codes(tensor), codes[0])
        np.testing.assert_array_equal(unpack_rows(tensor, np.array([rows - 1])), codes[:, -1])


def test_packing_accepts_any_memory_order() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 8, (1, 24, 16)).astype(np.uint8)
    depths = np.full((1, 3, 16), 3, np.uint8)
    packed = pack_codes(codes, depths, 8, 1)
    turned = np.ascontiguousarray(codes.swapaxes(1, 2)).swapaxes(1, 2)
    np.testing.assert_array_equal(pack_codes(turned, depths, 8, 1), packed)
    wide = np.zeros((1, 24, 50), np.uint8)
    wide[..., 3:19] = codes
    np.testing.assert_array_equal(pack_codes(wide[..., 3:19], depths, 8, 1), packed)


def test_packing_refuses_codes_that_do_not_fit() -> None:
    codes = np.zeros((1, 4, 2), np.uint8)
    depths = np.array([[[2, 0]]], np.uint8)
    codes[0, 3, 0] = 4
    with pytest.raises(WriteError, match="not below 2\\^depth"):
        pack_codes(codes, depths, 4, 1)
    with pytest.raises(WriteError, match="expected uint8"):
        pack_codes(codes.astype(np.int64), depths, 4, 1)  # type: ignore[arg-type]
    with pytest.raises(WriteError, match="3 partitions do not divide 4"):
        pack_codes(codes, depths, 4, 3)
    with pytest.raises(WriteError, match="depths of shape"):
        pack_codes(codes, depths, 2, 1)

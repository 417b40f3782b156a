"""No file makes a reader, and no model a writer, ask for memory out of proportion."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cvxq_format import Codebook, CompandedTensor, FormatError, Geometry, Reader, WriteError, Writer


def peak_bytes(path: Path) -> int:
    """Return the peak memory of opening a file and parsing everything in it, errors included."""
    tracemalloc.start()
    try:
        with Reader(path) as reader:
            for name in reader.files:
                reader.file(name)
            for name in reader.names:
                reader.read(name)
    except FormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_memory_is_bounded_for_faulty_files(faulty: Path, faulty_name: str) -> None:
    assert peak_bytes(faulty / faulty_name) < 1 << 20


@pytest.mark.parametrize(
    ("group_size", "partitions", "order"),
    [(2, 1 << 16, "rows"), (2, 1 << 16, "none"), (1 << 16, 1, "map"), (300, 256, "map")],
)
@pytest.mark.parametrize("row_scale_bits", [0, 1])
def test_memory_of_side_information(
    tmp_path: Path, group_size: int, partitions: int, order: str, row_scale_bits: int
) -> None:
    """The dearest shapes: one column, a partition of two rows or clusters, one bit for all."""
    rows = 1 << 17
    depths = np.zeros((1, Geometry(1, rows, 1, group_size, partitions).clusters, 1), np.uint8)
    tensor = CompandedTensor(
        shape=(rows, 1),
        group_size=group_size,
        partitions=partitions,
        scale_unit=np.float32(1),
        depths=depths,
        scale_codes=np.zeros_like(depths),
        packed_codes=np.zeros(0, np.uint8),
        permutation=None if order == "none" else np.arange(rows)[None],
        cluster_map=order == "map",
        row_scale_codes=np.zeros((1, rows), np.uint8) if row_scale_bits else None,
        row_scale_bits=row_scale_bits,
        scale_bits=1,
    )
    path = tmp_path / "wide.cvxq"
    with Writer(path, [Codebook.default(1)]) as writer:
        writer.add_companded("w", tensor)
    assert peak_bytes(path) < 250 * tensor.payload_size + (1 << 20)


def test_memory_of_a_deflated_file_is_what_it_says(tmp_path: Path) -> None:
    """Zeros deflate as far as anything can."""
    path, size = tmp_path / "zeros.cvxq", 64 << 20
    with Writer(path) as writer:
        writer.add_file("zeros", bytes(size))
    assert path.stat().st_size < size // 1000
    assert peak_bytes(path) < 2 * size + (1 << 20)
    with Reader(path) as reader:
        assert reader.file("zeros") == bytes(size)


def test_writer_streams(tmp_path: Path) -> None:
    """Memory stays near one tensor, however many are written."""
    one = np.zeros(1 << 20, np.uint8)
    tracemalloc.start()
    with Writer(tmp_path / "many.cvxq") as writer:
        for i in range(32):
            writer.add_raw(f"t{i}", one)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * one.nbytes


def test_weights_per_byte_are_limited(tmp_path: Path) -> None:
    """A pruned matrix in giant groups would expand to far more than its bytes."""
    depths = np.zeros((1, 1, 8), np.uint8)
    tensor = CompandedTensor(
        shape=(65536, 8),
        group_size=65536,
        partitions=1,
        scale_unit=np.float32(1),
        depths=depths,
        scale_codes=depths,
        packed_codes=np.zeros(0, np.uint8),
    )
    with (
        pytest.raises(WriteError, match="allowed 4096 per byte; use smaller groups"),
        Writer(tmp_path / "a.cvxq", [Codebook.default()]) as writer,
    ):
        writer.add_companded("w", tensor)

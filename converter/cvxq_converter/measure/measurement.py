"""What was measured on a model, kept in a file, so that many conversions can share it.

The file holds the calibration tokens (`sequences`, (S, L) int32) and, as `MATRIX/FIELD`, the
arrays of every matrix's statistics that `FIELDS` lists; equal arrays are stored once. Loading is
strict: whatever is missing, unexpected, of another shape or not finite is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cvxq_format.unfinished import Unfinished

from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.measurement_file import MeasuredMatrix, Record, open_measurement
from cvxq_converter.measure.safetensors_file import write_safetensors
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.checkpoint import Source
from cvxq_converter.source.loaded import LoadedModel

MEASURED_OPTIONS = ("calibration", "sequences", "length", "metric", "seed", "dtype")


@dataclass(frozen=True)
class Field:
    """One array of a matrix's statistics: its axes and dtype.

    Axes are N outputs, K inputs, S sequences measured on, and L tokens of each.
    """

    axes: str
    dtype: type
    is_optional: bool = False

    def shape(self, matrix: MeasuredMatrix, length: int) -> tuple[int, ...]:
        """The shape for one matrix, measured on sequences of `length` tokens."""
        sizes = dict(zip("NKSL", (*matrix.shape, matrix.sequences, length), strict=True))
        return tuple(sizes[axis] for axis in self.axes)


FIELDS = {
    "row_sensitivity": Field("N", np.float64),
    "column_sensitivity": Field("K", np.float64),
    "row_evidence": Field("N", np.int64),
    "column_evidence": Field("K", np.int64),
    "input_mean": Field("K", np.float32, is_optional=True),
    "input_second_moment": Field("K", np.float32, is_optional=True),
    "token_weights": Field("SL", np.float32, is_optional=True),
    "lookup_moment": Field("KK", np.float32, is_optional=True),
    "routed_tokens": Field("S", np.int64, is_optional=True),
}


@dataclass(frozen=True)
class Measurement:
    """All that quantizing a model needs to know of it, beside its weights.

    sequences: (S, L) int64 calibration tokens. statistics: by matrix name.
    """

    record: Record
    sequences: torch.Tensor
    statistics: dict[str, MatrixStatistics]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over everything that was measured."""
        total = hashlib.sha256(calibration_digest(self.sequences).encode())
        for name, array in _arrays(self.statistics).items():
            total.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def check(self, source: Source, options: ConversionOptions) -> None:
        """Raise ConversionError unless this was measured on `source`, with these options."""
        record = self.record
        if record.source_sha256 != source.digest:
            raise ConversionError(
                f"the statistics are of {record.source} (sha256 {record.source_sha256[:12]}…), "
                f"the model is {source.name} ({source.digest[:12]}…); measure this one"
            )
        actual = {"sequences": record.sequences, "length": record.length}
        wanted = measured_options(options)
        for name, measured in record.options.items():
            if wanted[name] not in (measured, actual.get(name, measured)):
                raise ConversionError(
                    f"--{name} {wanted[name]}: the statistics were measured with "
                    f"{actual.get(name, measured)}; measure again, or leave the option out"
                )

    def statistics_for(self, loaded: LoadedModel) -> dict[str, MatrixStatistics]:
        """The statistics of the matrices to quantize; ConversionError if one was not measured."""
        for matrix in loaded.matrices:
            if matrix.name not in self.statistics:
                raise ConversionError(
                    f"{matrix.name} was not measured, {len(self.statistics)} matrices were; "
                    "give the --keep of the measurement, or measure again without it"
                )
        return {m.name: self.statistics[m.name] for m in loaded.matrices}


def measured_options(options: ConversionOptions) -> dict[str, Any]:
    """The options that shape a measurement, as JSON values."""
    values = options.to_json()
    return {name: values[name] for name in MEASURED_OPTIONS}


def calibration_digest(sequences: torch.Tensor) -> str:
    """SHA-256 (hex) over calibration tokens (S, L) int64."""
    return hashlib.sha256(sequences.contiguous().numpy().tobytes()).hexdigest()


def matrices_of(statistics: Mapping[str, MatrixStatistics]) -> dict[str, MeasuredMatrix]:
    """Shapes and amounts for the record."""
    return {
        name: MeasuredMatrix((len(s.row_sensitivity), len(s.column_sensitivity)), s.sequences)
        for name, s in statistics.items()
    }


def shared_arrays(statistics: Mapping[str, MatrixStatistics]) -> dict[str, str]:
    """Tensor name → the earlier one that holds the same values, for those that need no storing.

    Layers that are fed the same inputs have their moments in common.
    """
    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    shared = {}
    for name, array in _arrays(statistics).items():
        content = hashlib.sha256(np.ascontiguousarray(array).data).digest()
        origin = first.setdefault((array.dtype.str, array.shape, content), name)
        if origin != name:
            shared[name] = origin
    return shared


def save_measurement(measurement: Measurement, path: Path) -> None:
    """Write the measurement; an existing file is only ever replaced by a complete one."""
    record = measurement.record
    arrays = _arrays(measurement.statistics)
    stored = {n: np.ascontiguousarray(a) for n, a in arrays.items() if n not in record.shared}
    stored["sequences"] = measurement.sequences.to(torch.int32).numpy()
    unfinished = Unfinished(path)
    try:
        write_safetensors(unfinished.file, stored, record.to_metadata())
        unfinished.finish()
    except BaseException:
        unfinished.abandon()
        raise


def load_measurement(path: Path) -> Measurement:
    """Read and check a measurement; ConversionError says in one line what is wrong with it."""
    with open_measurement(path) as file:
        record = Record.from_metadata(file.metadata(), path.name)
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tokens = arrays.pop("sequences", np.zeros((0, 0), np.int32))
    sequences = torch.from_numpy(tokens.astype(np.int64))
    if calibration_digest(sequences) != record.calibration_sha256:
        raise ConversionError(f"{path.name}: its calibration tokens are damaged; measure again")
    arrays |= {name: arrays[origin] for name, origin in record.shared.items() if origin in arrays}
    statistics = {
        name: _statistics(path.name, name, matrix, sequences.shape[1], arrays)
        for name, matrix in record.matrices.items()
    }
    if arrays:
        raise ConversionError(
            f"{path.name}: {min(arrays)} is not part of a measurement; measure again"
        )
    return Measurement(record, sequences, statistics)


def _arrays(statistics: Mapping[str, MatrixStatistics]) -> dict[str, np.ndarray]:
    found = {f"{n}/{f}": getattr(s, f) for n, s in statistics.items() for f in FIELDS}
    return {name: array for name, array in found.items() if array is not None}


def _statistics(
    file: str,
    name: str,
    matrix: MeasuredMatrix,
    length: int,
    arrays: dict[str, np.ndarray],
) -> MatrixStatistics:
    """Take the arrays of one matrix out of `arrays`."""
    taken: dict[str, Any] = {}
    for field, expected in FIELDS.items():
        array = taken[field] = arrays.pop(f"{name}/{field}", None)
        if array is None and expected.is_optional:
            continue
        shape = expected.shape(matrix, length)
        if array is None or array.shape != shape or array.dtype != expected.dtype:
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise ConversionError(
                f"{file}: {name}/{field} is {found}, expected "
                f"{np.dtype(expected.dtype)} {shape}; measure again"
            )
        if not np.isfinite(array).all():
            raise ConversionError(f"{file}: {name}/{field} is not finite; measure again")
    return MatrixStatistics(**taken, sequences=matrix.sequences)

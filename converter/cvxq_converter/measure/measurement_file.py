"""The file that `cvxq measure` writes: what it says about itself, and what can be wrong with it.

A safetensors file. Its metadata hold one JSON document, the record; its tensors are described in
`measurement`. Reading the record alone needs neither torch nor the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cvxq_converter.errors import ConversionError, one_line
from cvxq_converter.measure.curve import Curve

KEY = "cvxq_measurement"  # of the metadata; a single entry, since their order is not kept
VERSION = 1


@dataclass(frozen=True)
class MeasuredMatrix:
    """Shape (N, K) of a matrix, and how many sequences were measured."""

    shape: tuple[int, int]
    sequences: int


@dataclass(frozen=True)
class Record:
    """Where a measurement comes from, and the curve that follows from it.

    options: those that shaped the measurement, as they were asked for. sequences, length: of the
    calibration, as they turned out. shared: tensors that are not stored because another one holds
    the same values. curve_options: those that shaped the curve alone.
    """

    source: str
    source_sha256: str
    options: dict[str, Any]
    sequences: int
    length: int
    calibration_sha256: str
    matrices: dict[str, MeasuredMatrix]
    shared: dict[str, str]
    versions: dict[str, str]
    device: str
    threads: int
    parameters: int
    quantized_weights: int
    curve_options: dict[str, Any]
    curve: Curve

    def to_metadata(self) -> dict[str, str]:
        """The record as metadata of a safetensors file, the same text for the same record."""
        document = {"version": VERSION, **asdict(self), "curve": self.curve.to_json()}
        return {KEY: json.dumps(document, sort_keys=True, ensure_ascii=False)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, name: str) -> Record:
        """Raises ConversionError, with the file's `name`, for metadata of another kind."""
        text = (metadata or {}).get(KEY)
        if text is None:
            raise ConversionError(f"{name}: not a measurement; make one with cvxq measure")
        try:
            values = json.loads(text)
            version = values.pop("version")
            if version != VERSION:
                raise ConversionError(
                    f"{name}: a measurement of version {version}, this cvxq reads {VERSION}; "
                    "measure again"
                )
            matrices = {
                matrix: MeasuredMatrix(tuple(item["shape"]), int(item["sequences"]))
                for matrix, item in values.pop("matrices").items()
            }
            return cls(matrices=matrices, curve=Curve.from_json(values.pop("curve")), **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(
                f"{name}: its description cannot be read ({one_line(error)}); measure again"
            ) from None


def open_measurement(path: Path) -> Any:
    """The safetensors file, as a context manager; ConversionError if it is none."""
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise ConversionError(f"{path.name}: no such file; make one with cvxq measure") from None
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path.name}: not a measurement ({one_line(error)}); make one with cvxq measure"
        ) from None


def read_record(path: Path) -> Record:
    """Read what a measurement says about itself, without its tensors."""
    with open_measurement(path) as file:
        return Record.from_metadata(file.metadata(), path.name)

"""The entries of the header, one record for each kind of section, parsed and checked.

A key that a later minor version added is absent unless it is used; what it means while absent is
its field's default.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar

from cvxq_format.codebook import codebook_size
from cvxq_format.errors import CorruptError, UnsupportedError
from cvxq_format.geometry import Geometry
from cvxq_format.json_strict import Fields
from cvxq_format.limits import (
    ALL_LEVEL_DEPTHS,
    MAX_CODEBOOKS,
    MAX_DIMENSION,
    MAX_ELEMENTS,
    MAX_GROUP_SIZE,
    MAX_INFLATED_SIZE,
    MAX_INFLATION,
    MAX_NAME_BYTES,
    MAX_RANK,
    MAX_WEIGHTS_PER_BYTE,
    PREAMBLE_SIZE,
)
from cvxq_format.payload import Layout
from cvxq_format.raw import DTYPE_SIZES

_FILE_PART = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+"
_FILE_NAME = re.compile(rf"(?=.{{1,255}}$){_FILE_PART}(?:/{_FILE_PART})?")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_INPUT_TRANSFORMS = ("none",)
_ORIENTATIONS = ("out_in", "in_out")
_MAX_CRC32, _MAX_OFFSET = 2**32 - 1, 2**63 - 1
_FEATURE_OF_KEY = {
    "cluster_map": "cluster-maps",
    "row_scale_bits": "row-scales",
    "level_depths": "short-codebooks",
    "inflated_size": "deflated-files",
}


@dataclass(frozen=True)
class Section:
    """Where some bytes lie: offset and size in the file, and their CRC-32."""

    offset: int
    size: int
    crc32: int

    def used_features(self) -> dict[str, str]:
        """Return the required features that this entry uses, and the key that uses each."""
        kind: Any = type(self)  # mypy takes its instances' hash for its own
        found = _features_of(kind)
        return {feature: key for feature, key, unused in found if getattr(self, key) != unused}

    def to_json(self) -> dict[str, Any]:
        """Return the entry as the header has it, without the keys of features not used."""
        absent = _FEATURE_OF_KEY.keys() - self.used_features().values()
        return {key: value for key, value in asdict(self).items() if key not in absent}


@cache
def _features_of(kind: type[Section]) -> list[tuple[str, str, Any]]:
    """Return the features that entries of a kind may use: name, key, its value when unused."""
    keys = [(field.name, field.default) for field in fields(kind)]
    return [(_FEATURE_OF_KEY[key], key, unused) for key, unused in keys if key in _FEATURE_OF_KEY]


@dataclass(frozen=True)
class CodebookEntry(Section):
    """A codebook section with 2^scale_bits scales.

    level_depths: bit B − 1 is set if the section holds the level table of depth B.
    """

    scale_bits: int
    level_depths: int = ALL_LEVEL_DEPTHS


@dataclass(frozen=True)
class FileEntry(Section):
    """A file of the source checkpoint or the converter.

    inflated_size: its bytes, where the section holds them deflated; None where it holds them as
    they are.
    """

    name: str
    inflated_size: int | None = None

    @property
    def original_size(self) -> int:
        """Bytes of the file itself."""
        return self.size if self.inflated_size is None else self.inflated_size


@dataclass(frozen=True)
class RawEntry(Section):
    """A tensor stored element by element, in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: ClassVar[str] = "raw"

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "codec": self.codec}


@dataclass(frozen=True)
class CompandedEntry(Section):
    """A matrix (N, K) or stack (E, N, K) stored as codes; fields as in FORMAT.md."""

    name: str
    shape: tuple[int, ...]
    codebook: int
    group_size: int
    partitions: int
    transposed: bool
    source_orientation: str
    depths: str
    column_bits: int
    column_shift: int
    means: bool
    permuted: bool
    input_transform: str = "none"
    cluster_map: bool = False
    row_scale_bits: int = 0
    codec: ClassVar[str] = "companded"

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "codec": self.codec}

    @property
    def separable(self) -> bool:
        return self.depths == "separable"

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.shape, self.group_size, self.partitions, self.transposed)

    def layout(self, scale_bits: int) -> Layout:
        """Return which blocks the payload has; scale_bits: of its codebook."""
        return Layout(
            geometry=self.geometry,
            scale_bits=scale_bits,
            column_bits=self.column_bits,
            separable=self.separable,
            means=self.means,
            permuted=self.permuted,
            cluster_map=self.cluster_map,
            row_scale_bits=self.row_scale_bits,
        )


TensorEntry = RawEntry | CompandedEntry


def check_tensor_name(name: str) -> None:
    """Raise CorruptError unless a tensor name is 1 to 512 bytes of UTF-8 on one line."""
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= MAX_NAME_BYTES or _CONTROL.search(name):
        raise CorruptError(
            f"header: tensor name {name[:80]!a}, allowed 1 to {MAX_NAME_BYTES} bytes of "
            "UTF-8 without control characters"
        )


def check_file_name(name: str) -> None:
    """Raise CorruptError unless a file name is plain, with at most one folder."""
    if not _FILE_NAME.fullmatch(name):
        raise CorruptError(
            f"header: file name {name[:80]!a}, allowed letters, digits, '.', '_', '-' and "
            "one folder, at most 255 bytes"
        )


def _section(fields: Fields) -> tuple[int, int, int]:
    return (
        fields.integer("offset", PREAMBLE_SIZE, _MAX_OFFSET),
        fields.integer("size", 0, _MAX_OFFSET),
        fields.integer("crc32", 0, _MAX_CRC32),
    )


def read_codebook_entry(fields: Fields) -> CodebookEntry:
    scale_bits = fields.integer("scale_bits", 1, 8)
    level_depths = ALL_LEVEL_DEPTHS
    if fields.has("level_depths"):
        level_depths = fields.integer("level_depths", 0, ALL_LEVEL_DEPTHS - 1)
    entry = CodebookEntry(*_section(fields), scale_bits=scale_bits, level_depths=level_depths)
    fields.finish()
    expected = codebook_size(scale_bits, level_depths)
    if entry.size != expected:
        raise CorruptError(
            f"{fields.where}: {entry.size} bytes, {scale_bits} scale bits need "
            f"{expected} with level depths {level_depths:#x}; the file is corrupt"
        )
    return entry


def read_file_entry(fields: Fields) -> FileEntry:
    name = fields.text("name")
    check_file_name(name)
    section = _section(fields)
    size = None
    if fields.has("inflated_size"):
        size = fields.integer("inflated_size", 1, MAX_INFLATED_SIZE)
    entry = FileEntry(*section, name=name, inflated_size=size)
    fields.finish()
    if entry.original_size > MAX_INFLATION * entry.size:
        raise CorruptError(
            f"header: file {name!r} inflates from {entry.size} to {size} bytes, allowed "
            f"{MAX_INFLATION} per byte; the file is corrupt"
        )
    return entry


def _shape(fields: Fields, ranks: tuple[int, ...], low: int) -> tuple[int, ...]:
    shape = fields.items("shape")
    if len(shape) not in ranks:
        raise CorruptError(f"{fields.where}: {len(shape)} dimensions, allowed {ranks}")
    for dimension in shape:
        if type(dimension) is not int or not low <= dimension <= MAX_DIMENSION:
            raise CorruptError(
                f"{fields.where}: dimension {str(dimension)[:40]}, allowed {low} to {MAX_DIMENSION}"
            )
    if math.prod(max(1, dimension) for dimension in shape) > MAX_ELEMENTS:
        raise CorruptError(f"{fields.where}: shape {shape}, allowed {MAX_ELEMENTS} elements")
    return tuple(shape)


def read_tensor_entry(fields: Fields) -> TensorEntry:
    name = fields.text("name")
    check_tensor_name(name)
    fields.where = f"tensor {name!r}"
    codec = fields.text("codec")
    if codec == "raw":
        entry: TensorEntry = _raw(fields, name)
    elif codec == "companded":
        entry = _companded(fields, name)
    else:
        raise UnsupportedError(
            f"tensor {name!r} has codec {codec[:80]!r}, this reader knows raw and companded; "
            "update cvxq"
        )
    fields.finish()
    return entry


def _raw(fields: Fields, name: str) -> RawEntry:
    dtype = fields.choice("dtype", tuple(DTYPE_SIZES))
    shape = _shape(fields, tuple(range(MAX_RANK + 1)), 0)
    entry = RawEntry(*_section(fields), name=name, dtype=dtype, shape=shape)
    expected = math.prod(shape) * DTYPE_SIZES[dtype]
    if entry.size != expected:
        raise CorruptError(
            f"tensor {name!r}: {entry.size} bytes, {dtype} {list(shape)} needs {expected}; "
            "the file is corrupt"
        )
    return entry


def _companded(fields: Fields, name: str) -> CompandedEntry:
    transform = fields.text("input_transform")
    if transform not in _INPUT_TRANSFORMS:
        raise UnsupportedError(
            f"tensor {name!r} has input transform {transform[:80]!r}, this reader knows none; "
            "update cvxq"
        )
    entry = CompandedEntry(
        *_section(fields),
        name=name,
        shape=_shape(fields, (2, 3), 1),
        codebook=fields.integer("codebook", 0, MAX_CODEBOOKS - 1),
        group_size=fields.integer("group_size", 1, MAX_GROUP_SIZE),
        partitions=fields.integer("partitions", 1, MAX_DIMENSION),
        transposed=fields.boolean("transposed"),
        source_orientation=fields.choice("source_orientation", _ORIENTATIONS),
        depths=fields.choice("depths", ("separable", "explicit")),
        column_bits=fields.integer("column_bits", 0, 8),
        column_shift=fields.integer("column_shift", 0, 8),
        means=fields.boolean("means"),
        permuted=fields.boolean("permuted"),
        cluster_map=fields.has("cluster_map") and fields.true("cluster_map"),
        row_scale_bits=fields.integer("row_scale_bits", 1, 8)
        if fields.has("row_scale_bits")
        else 0,
    )
    if not entry.separable and (entry.column_bits or entry.column_shift):
        raise CorruptError(f"tensor {name!r}: explicit depths with column bits or shift, allowed 0")
    try:
        weights = entry.geometry.weights
    except ValueError as error:
        raise CorruptError(f"tensor {name!r}: {error}; the file is corrupt") from error
    if entry.row_scale_bits and entry.transposed:
        raise CorruptError(f"tensor {name!r}: row scales of a transposed matrix, allowed without")
    if entry.cluster_map and not entry.permuted:
        raise CorruptError(f"tensor {name!r}: a cluster map, but not permuted; the file is corrupt")
    if entry.cluster_map and entry.geometry.clusters_per_partition == 1:
        raise CorruptError(
            f"tensor {name!r}: a cluster map with one cluster per partition, allowed from 2 on; "
            "the file is corrupt"
        )
    if weights > MAX_WEIGHTS_PER_BYTE * entry.size:
        raise CorruptError(
            f"tensor {name!r}: {weights} weights in {entry.size} bytes, allowed "
            f"{MAX_WEIGHTS_PER_BYTE} per byte; the file is corrupt"
        )
    return entry

"""The header: one JSON object that names every section, as typed records."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

from cvxq_format.codebook import codebook_size
from cvxq_format.errors import CorruptError, UnsupportedError
from cvxq_format.geometry import Geometry
from cvxq_format.json_strict import Fields, canonical, parse
from cvxq_format.limits import (
    KNOWN_REQUIRED_FEATURES,
    MAX_CODEBOOKS,
    MAX_DIMENSION,
    MAX_ELEMENTS,
    MAX_GROUP_SIZE,
    MAX_NAME_BYTES,
    MAX_RANK,
    MAX_WEIGHTS_PER_BYTE,
    PREAMBLE_SIZE,
    align,
)
from cvxq_format.raw import DTYPE_SIZES

_FILE_PART = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+"
_FILE_NAME = re.compile(rf"(?=.{{1,255}}$){_FILE_PART}(?:/{_FILE_PART})?")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_FEATURE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_INPUT_TRANSFORMS = ("none",)
_ORIENTATIONS = ("out_in", "in_out")
_MAX_CRC32, _MAX_OFFSET = 2**32 - 1, 2**63 - 1


@dataclass(frozen=True)
class Section:
    """Where some bytes lie: offset and size in the file, and their CRC-32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class CodebookEntry(Section):
    """A codebook section with 2^scale_bits scales."""

    scale_bits: int


@dataclass(frozen=True)
class FileEntry(Section):
    """A file of the source checkpoint or the converter, carried verbatim."""

    name: str


@dataclass(frozen=True)
class RawEntry(Section):
    """A tensor stored element by element, in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: ClassVar[str] = "raw"


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
    codec: ClassVar[str] = "companded"

    @property
    def separable(self) -> bool:
        return self.depths == "separable"

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.shape, self.group_size, self.partitions, self.transposed)


TensorEntry = RawEntry | CompandedEntry


@dataclass(frozen=True)
class Header:
    """Everything the header says; each list in the order of the file's bytes."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    tensors: tuple[TensorEntry, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    added_biases: tuple[str, ...] = ()
    codebooks: tuple[CodebookEntry, ...] = ()
    files: tuple[FileEntry, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the canonical JSON."""
        tensors = [{**asdict(entry), "codec": entry.codec} for entry in self.tensors]
        return canonical({**asdict(self), "tensors": tensors, "aliases": dict(self.aliases)})

    @classmethod
    def from_bytes(cls, data: bytes, lenient: bool) -> Header:
        """Parse and check the header; lenient: ignore unknown keys (newer minor version).

        Raises CorruptError, or UnsupportedError for an unknown required feature, codec or
        input transform.
        """
        fields = Fields("header", parse(data), lenient)
        required = fields.texts("required")
        optional = fields.texts("optional")
        for feature in (*required, *optional):
            if not _FEATURE.fullmatch(feature):
                raise CorruptError(f"header: feature name {feature[:80]!r} is malformed")
        for feature in required:
            if feature not in KNOWN_REQUIRED_FEATURES:
                raise UnsupportedError(
                    f"the file requires feature {feature!r}, unknown to this reader; update cvxq"
                )
        header = cls(
            required=tuple(required),
            optional=tuple(optional),
            codebooks=tuple(
                _codebook(Fields(f"header, codebooks[{i}]", item, lenient))
                for i, item in enumerate(fields.items("codebooks"))
            ),
            tensors=tuple(
                _tensor(Fields(f"header, tensors[{i}]", item, lenient))
                for i, item in enumerate(fields.items("tensors"))
            ),
            aliases=tuple(sorted(fields.mapping("aliases").items())),
            added_biases=tuple(fields.texts("added_biases")),
            files=tuple(
                _file(Fields(f"header, files[{i}]", item, lenient))
                for i, item in enumerate(fields.items("files"))
            ),
        )
        fields.finish()
        header.check_references()
        return header

    def check_references(self) -> None:
        """Raise CorruptError if names clash or point nowhere."""
        tensors = {entry.name: entry for entry in self.tensors}
        names = [*(entry.name for entry in self.tensors), *(alias for alias, _ in self.aliases)]
        _check_distinct("tensor name", names)
        _check_distinct("file name", [entry.name for entry in self.files])
        _check_distinct("added bias", list(self.added_biases))
        _check_distinct("feature", [*self.required, *self.optional])
        if len(self.codebooks) > MAX_CODEBOOKS:
            raise CorruptError(f"header: {len(self.codebooks)} codebooks, allowed {MAX_CODEBOOKS}")
        for alias, target in self.aliases:
            check_tensor_name(alias)
            if target not in tensors:
                raise CorruptError(f"header: alias {alias!r} of {target!r}, which is no tensor")
        for name in self.added_biases:
            if name not in tensors or tensors[name].codec != "raw":
                raise CorruptError(f"header: added bias {name!r} is not a raw tensor")
        for entry in self.tensors:
            if isinstance(entry, CompandedEntry) and entry.codebook >= len(self.codebooks):
                raise CorruptError(
                    f"tensor {entry.name!r}: codebook {entry.codebook}, "
                    f"the file has {len(self.codebooks)}; the file is corrupt"
                )

    def sections(self) -> Iterator[tuple[str, str, Section]]:
        """Yield (kind, name, section) of all sections in file order."""
        found: list[tuple[str, str, Section]] = [
            *(("codebook", str(i), entry) for i, entry in enumerate(self.codebooks)),
            *(("tensor", entry.name, entry) for entry in self.tensors),
            *(("file", entry.name, entry) for entry in self.files),
        ]
        yield from sorted(found, key=lambda item: (item[2].offset, item[2].size))

    def check_layout(self, header_offset: int) -> None:
        """Raise CorruptError unless the sections tile the file up to the header."""
        for what in (self.codebooks, self.tensors, self.files):
            offsets = [entry.offset for entry in what]
            if offsets != sorted(offsets):
                raise CorruptError("header: sections are not listed by offset; the file is corrupt")
        end, before = PREAMBLE_SIZE, "preamble"
        for kind, name, section in self.sections():
            if section.offset != align(end):
                raise CorruptError(
                    f"{kind} {name!r} starts at byte {section.offset:#x}, but {before} ends at "
                    f"{end:#x}: allowed {align(end):#x}; the file is corrupt"
                )
            end, before = section.offset + section.size, f"{kind} {name!r}"
        if header_offset != align(end):
            raise CorruptError(
                f"header starts at byte {header_offset:#x}, but {before} ends at {end:#x}: "
                f"allowed {align(end):#x}; the file is corrupt"
            )


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


def _check_distinct(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CorruptError(f"header: {what} {name!r} appears twice; the file is corrupt")
        seen.add(name)


def _section(fields: Fields) -> tuple[int, int, int]:
    return (
        fields.integer("offset", PREAMBLE_SIZE, _MAX_OFFSET),
        fields.integer("size", 0, _MAX_OFFSET),
        fields.integer("crc32", 0, _MAX_CRC32),
    )


def _codebook(fields: Fields) -> CodebookEntry:
    scale_bits = fields.integer("scale_bits", 1, 8)
    entry = CodebookEntry(*_section(fields), scale_bits=scale_bits)
    fields.finish()
    if entry.size != codebook_size(scale_bits):
        raise CorruptError(
            f"{fields.where}: {entry.size} bytes, {scale_bits} scale bits need "
            f"{codebook_size(scale_bits)}; the file is corrupt"
        )
    return entry


def _file(fields: Fields) -> FileEntry:
    name = fields.text("name")
    check_file_name(name)
    entry = FileEntry(*_section(fields), name=name)
    fields.finish()
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


def _tensor(fields: Fields) -> TensorEntry:
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
    )
    if not entry.separable and (entry.column_bits or entry.column_shift):
        raise CorruptError(f"tensor {name!r}: explicit depths with column bits or shift, allowed 0")
    try:
        weights = entry.geometry.weights
    except ValueError as error:
        raise CorruptError(f"tensor {name!r}: {error}; the file is corrupt") from error
    if weights > MAX_WEIGHTS_PER_BYTE * entry.size:
        raise CorruptError(
            f"tensor {name!r}: {weights} weights in {entry.size} bytes, allowed "
            f"{MAX_WEIGHTS_PER_BYTE} per byte; the file is corrupt"
        )
    return entry

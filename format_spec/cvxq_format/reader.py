"""Reading a container: the header at once, every section when it is asked for."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cvxq_format import companded, raw
from cvxq_format.codebook import Codebook
from cvxq_format.entries import CompandedEntry, Section, TensorEntry
from cvxq_format.errors import CorruptError, FormatError
from cvxq_format.files import inflate
from cvxq_format.header import Header
from cvxq_format.limits import PREAMBLE_SIZE
from cvxq_format.preamble import Preamble
from cvxq_format.raw import RawTensor
from cvxq_format.tensor import CompandedTensor


class SectionInfo(NamedTuple):
    """One stretch of the file; `padding` counts the zero bytes that follow it."""

    kind: str
    name: str
    offset: int
    size: int
    padding: int


class Reader:
    """A mapped container; use it as a context manager.

    path: the file. check: compare each section's checksum when it is first read; preamble and
    header are always checked. crc32: computes checksums. What `read` returns may view the mapping
    and outlives `close`. Several threads may read.
    Raises FormatError subclasses, with the path in front, and OSError if the file cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        check: bool = True,
        crc32: Callable[[memoryview], int] = zlib.crc32,
    ) -> None:
        self.path = Path(path)
        self._check = check
        self._crc32 = crc32
        self._checked: set[int] = set()
        self._codebooks: dict[int, Codebook] = {}
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                self.preamble = Preamble.from_bytes(file.read(PREAMBLE_SIZE), size)
                self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                self.header = self._read_header()
            except FormatError as error:
                raise type(error)(f"{self.path}: {error}") from error
        self._tensors = {entry.name: entry for entry in self.header.tensors}
        self._files = {entry.name: entry for entry in self.header.files}
        self.aliases = dict(self.header.aliases)
        self.added_biases = list(self.header.added_biases)

    def _read_header(self) -> Header:
        data = bytes(self._map[self.preamble.header_offset :])
        if zlib.crc32(data) != self.preamble.header_crc32:
            raise CorruptError(
                f"header at byte {self.preamble.header_offset:#x}: checksum differs; "
                "the file is corrupt"
            )
        header = Header.from_bytes(data, lenient=self.preamble.is_newer)
        header.check_features(self.preamble.version[1])
        header.check_layout(self.preamble.header_offset)
        return header

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapping; it ends when the last tensor viewing it does."""
        self._map = memoryview(b"")

    @property
    def names(self) -> list[str]:
        """Names of all tensors in file order, aliases left out."""
        return list(self._tensors)

    @property
    def files(self) -> list[str]:
        """Names of the carried files, in file order."""
        return list(self._files)

    def entry(self, name: str) -> TensorEntry:
        """Return the header entry of a tensor or alias; raises KeyError if there is none."""
        return self._tensors[self.aliases.get(name, name)]

    def read(self, name: str) -> RawTensor | CompandedTensor:
        """Return a tensor, checked; raises CorruptError naming it, or KeyError."""
        entry = self.entry(name)
        data = self._section(entry, f"tensor {entry.name!r}")
        try:
            if isinstance(entry, CompandedEntry):
                return companded.decode(entry, data, self.codebook(entry.codebook))
            return raw.decode(entry.dtype, entry.shape, data)
        except CorruptError as error:
            text = str(error)
            where = (
                "" if repr(entry.name) in text or "codebook" in text else f"tensor {entry.name!r}: "
            )
            raise CorruptError(f"{where}{text}") from error

    def codebook(self, index: int) -> Codebook:
        """Return codebook `index`; raises CorruptError naming it, or IndexError."""
        if index not in self._codebooks:
            entry = self.header.codebooks[index]
            data = self._section(entry, f"codebook {index}")
            try:
                book = Codebook.from_bytes(data, entry.scale_bits, entry.level_depths)
                self._codebooks[index] = book
            except CorruptError as error:
                where = f"codebook {index} at byte {entry.offset:#x}"
                raise CorruptError(f"{where}: {error}; the file is corrupt") from error
        return self._codebooks[index]

    def file(self, name: str) -> bytes:
        """Return the bytes of a carried file; raises CorruptError naming it, or KeyError."""
        entry = self._files[name]
        data = self._section(entry, f"file {name!r}")
        if entry.inflated_size is None:
            return bytes(data)
        try:
            return inflate(data, entry.inflated_size)
        except CorruptError as error:
            where = f"file {name!r} at byte {entry.offset:#x}"
            raise CorruptError(f"{where}: {error}; the file is corrupt") from error

    def _section(self, section: Section, what: str) -> memoryview:
        data = self._map[section.offset : section.offset + section.size]
        if self._check and section.offset not in self._checked:
            if self._crc32(data) != section.crc32:
                raise CorruptError(
                    f"{what} at byte {section.offset:#x}: checksum differs; the file is corrupt"
                )
            self._checked.add(section.offset)
        return data

    def sections(self) -> list[SectionInfo]:
        """Return every stretch of the file in order: preamble, sections, header."""
        preamble = self.preamble
        header = ("header", "", Section(preamble.header_offset, preamble.header_size, 0))
        start = ("preamble", "", Section(0, PREAMBLE_SIZE, 0))
        found = [start, *self.header.sections(), header]
        ends = [section.offset for _, _, section in found[1:]] + [preamble.file_size]
        return [
            SectionInfo(kind, name, s.offset, s.size, end - s.offset - s.size)
            for (kind, name, s), end in zip(found, ends, strict=True)
        ]

    def padding(self, section: SectionInfo) -> bytes:
        """Return the padding bytes behind a section."""
        end = section.offset + section.size
        return bytes(self._map[end : end + section.padding])

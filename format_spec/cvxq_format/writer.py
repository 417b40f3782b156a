"""Writing a container: one tensor at a time, and either the whole file or none."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cvxq_format import companded, raw
from cvxq_format.checks import check_values
from cvxq_format.codebook import Codebook
from cvxq_format.entries import (
    CodebookEntry,
    FileEntry,
    RawEntry,
    Section,
    check_file_name,
    check_tensor_name,
)
from cvxq_format.errors import CorruptError, FormatError, WriteError
from cvxq_format.files import stored
from cvxq_format.header import Header
from cvxq_format.limits import FEATURES, MAX_HEADER_SIZE, PREAMBLE_SIZE, VERSION, align
from cvxq_format.preamble import Preamble
from cvxq_format.tensor import CompandedTensor
from cvxq_format.unfinished import Unfinished

Entry = TypeVar("Entry", bound=Section)


class Writer:
    """A container being written; use it as a context manager.

    path: the target, replaced atomically by `close`; until then an unfinished file beside it grows,
    which an exception removes. codebooks: the tables that tensors refer to by index.
    required, optional: further feature names for the header, which requires by itself what its
    entries use. Nothing but the arguments reaches the file.
    Raises WriteError for what cannot be stored and OSError if the disk refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        codebooks: Sequence[Codebook] = (),
        required: Iterable[str] = (),
        optional: Iterable[str] = (),
    ) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise WriteError(f"{self.path} is a folder; name a file")
        self._header = Header(tuple(sorted(required)), tuple(sorted(optional)))
        self._codebooks = tuple(codebooks)
        self._names: set[str] = set()
        self._unfinished = Unfinished(self.path)
        self._file = self._unfinished.file
        try:
            self._file.write(bytes(PREAMBLE_SIZE))
            for codebook in self._codebooks:
                entry = CodebookEntry(
                    0, 0, 0, scale_bits=codebook.scale_bits, level_depths=codebook.level_depths
                )
                entry = self._append(entry, codebook.to_bytes())
                self._header = replace(self._header, codebooks=(*self._header.codebooks, entry))
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add_raw(
        self,
        name: str,
        array: npt.NDArray[np.generic],
        dtype: str | None = None,
        added_bias: bool = False,
    ) -> None:
        """Store an array as it is; dtype "bf16" takes bit patterns as uint16.

        added_bias: the source checkpoint has no such tensor; it is a bias that correction made.
        """
        stored, data = raw.encode(array, dtype)
        self._new_name(name)
        entry = RawEntry(0, 0, 0, name=name, dtype=stored, shape=array.shape)
        entry = self._append(entry, data)
        self._header = replace(self._header, tensors=(*self._header.tensors, entry))
        if added_bias:
            self._header = replace(self._header, added_biases=(*self._header.added_biases, name))

    def add_companded(self, name: str, tensor: CompandedTensor) -> None:
        """Store a companded matrix; raises WriteError if it breaks a rule of the format."""
        if not 0 <= tensor.codebook < len(self._codebooks):
            raise WriteError(
                f"tensor {name!r}: codebook {tensor.codebook}, the file has {len(self._codebooks)}"
            )
        payload = companded.encode(tensor)
        self._check_codebook(name, tensor, self._codebooks[tensor.codebook])
        self._new_name(name)
        entry = self._append(companded.entry_of(name, tensor), payload)
        self._header = replace(self._header, tensors=(*self._header.tensors, entry))

    def _check_codebook(self, name: str, tensor: CompandedTensor, codebook: Codebook) -> None:
        if tensor.scale_bits != codebook.scale_bits:
            raise WriteError(
                f"tensor {name!r}: {tensor.scale_bits} scale bits, "
                f"its codebook has {codebook.scale_bits}"
            )
        if tensor.column_terms is not None and tensor.cluster_terms is not None:
            terms = (tensor.column_terms, tensor.cluster_terms, tensor.column_shift)
            if np.any(codebook.depths_of(*terms) != tensor.depths):
                raise WriteError(f"tensor {name!r}: depths differ from what their terms say")
        try:
            check_values(tensor, codebook)
        except ValueError as error:
            raise WriteError(f"tensor {name!r}: {error}") from error

    def add_alias(self, name: str, target: str) -> None:
        """Record that `name` is the same tensor as `target`, added before."""
        if target not in {entry.name for entry in self._header.tensors}:
            raise WriteError(f"alias {name!r} of {target!r}, which has not been added")
        self._new_name(name)
        aliases = tuple(sorted((*self._header.aliases, (name, target))))
        self._header = replace(self._header, aliases=aliases)

    def add_file(self, name: str, data: bytes) -> None:
        """Carry a file, deflated where that pays; readers return the bytes given here."""
        try:
            check_file_name(name)
        except CorruptError as error:
            raise WriteError(str(error)) from error
        if name in {entry.name for entry in self._header.files}:
            raise WriteError(f"file {name!r} was added before")
        section, inflated_size = stored(data)
        entry = FileEntry(0, 0, 0, name=name, inflated_size=inflated_size)
        entry = self._append(entry, section)
        self._header = replace(self._header, files=(*self._header.files, entry))

    def close(self) -> None:
        """Write header and preamble, flush to the disk, and put the file in its place."""
        if not self._unfinished.is_open:
            return
        try:
            used = self._header.used_features()
            required = tuple(sorted(used.union(self._header.required)))
            self._header = replace(self._header, required=required)
            minor = max((FEATURES[feature] for feature in used), default=0)
            header = self._header.to_bytes()
            self._check_header(minor)
            if len(header) > MAX_HEADER_SIZE:
                raise WriteError(f"header of {len(header)} bytes, allowed {MAX_HEADER_SIZE}")
            offset = self._pad()
            self._file.write(header)
            version = (VERSION[0], minor)
            size, crc32 = len(header), zlib.crc32(header)
            preamble = Preamble(offset + size, offset, size, crc32, version)
            self._file.seek(0)
            self._file.write(preamble.to_bytes())
            self._unfinished.finish()
        except BaseException:
            self.abort()
            raise

    def _check_header(self, minor: int) -> None:
        """Raise WriteError if our own reader would refuse the header in a file of version `minor`.

        Required features that it does not know are left out: whoever names one vouches for it.
        """
        known = tuple(feature for feature in self._header.required if feature in FEATURES)
        try:
            known_only = replace(self._header, required=known).to_bytes()
            Header.from_bytes(known_only, lenient=False).check_features(minor)
        except FormatError as error:
            raise WriteError(str(error)) from error

    def abort(self) -> None:
        """Remove the temporary file; the target stays as it was."""
        self._unfinished.abandon()

    def _new_name(self, name: str) -> None:
        try:
            check_tensor_name(name)
        except CorruptError as error:
            raise WriteError(str(error)) from error
        if name in self._names:
            raise WriteError(f"tensor name {name!r} was added before")
        self._names.add(name)

    def _pad(self) -> int:
        position = self._file.tell()
        self._file.write(bytes(align(position) - position))
        return align(position)

    def _append(self, entry: Entry, data: bytes | npt.NDArray[np.uint8]) -> Entry:
        offset = self._pad()
        view = memoryview(data)  # type: ignore[arg-type]
        self._file.write(view)
        return replace(entry, offset=offset, size=view.nbytes, crc32=zlib.crc32(view))

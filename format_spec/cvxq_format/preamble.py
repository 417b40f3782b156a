"""The first 128 bytes: magic, version, where the header is, and which file of a set this is."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from cvxq_format.errors import CorruptError, NotCvxqError, TruncatedError, UnsupportedError
from cvxq_format.limits import MAGIC, MAX_HEADER_SIZE, PREAMBLE_SIZE, VERSION, align

_FIELDS = struct.Struct("<8sHHIQQQI16sII40s16s")
_CHECKSUM = struct.Struct("<I")
_NO_SET = bytes(16)


@dataclass(frozen=True)
class Preamble:
    """The preamble's fields that vary; offsets and sizes in bytes."""

    file_size: int
    header_offset: int
    header_size: int
    header_crc32: int
    version: tuple[int, int]

    @property
    def is_newer(self) -> bool:
        """True if the file's minor version is later than ours, so that unknown keys are ignored."""
        return self.version[1] > VERSION[1]

    def to_bytes(self) -> bytes:
        """Return the 128 bytes of a single, complete file."""
        fields = _FIELDS.pack(
            MAGIC,
            *self.version,
            PREAMBLE_SIZE,
            self.file_size,
            self.header_offset,
            self.header_size,
            self.header_crc32,
            _NO_SET,
            0,
            1,
            bytes(40),
            bytes(16),
        )
        return fields + _CHECKSUM.pack(zlib.crc32(fields))

    @classmethod
    def from_bytes(cls, data: bytes, actual_size: int) -> Preamble:
        """Parse and check the preamble of a file of `actual_size` bytes.

        Raises NotCvxqError, TruncatedError, CorruptError, or UnsupportedError for another major
        version and for one file of a split set.
        """
        if data[:8] != MAGIC[: len(data)] or not data:
            found = "empty file" if not data else f"first bytes {data[:8].hex(' ')}"
            raise NotCvxqError(f"{found}, a .cvxq file starts with {MAGIC.hex(' ')}; give one")
        if len(data) < PREAMBLE_SIZE:
            raise TruncatedError(
                f"file of {len(data)} bytes ends inside its preamble; copy it again"
            )
        (checksum,) = _CHECKSUM.unpack(data[124:128])
        if zlib.crc32(data[:124]) != checksum:
            raise CorruptError("preamble, bytes 0x0 to 0x7f: checksum differs; the file is corrupt")
        _, major, minor, size, file_size, offset, header_size, crc32, *rest = _FIELDS.unpack(
            data[:124]
        )
        set_id, index, count, reserved, _unused = rest
        if major != VERSION[0]:
            raise UnsupportedError(
                f"format version {major}.{minor}, this reader knows {VERSION[0]}.x; update cvxq"
            )
        if size != PREAMBLE_SIZE:
            raise CorruptError(
                f"preamble size {size}, allowed {PREAMBLE_SIZE}; the file is corrupt"
            )
        if minor <= VERSION[1] and any(reserved):
            raise CorruptError("preamble, bytes 0x44 to 0x6b: reserved, allowed zero")
        if count == 0 or index >= count:
            raise CorruptError(f"preamble: file index {index} of {count}; the file is corrupt")
        if count > 1:
            raise UnsupportedError(
                f"file {index + 1} of {count} of split set {set_id.hex()}; "
                "this reader takes single files, join the set first"
            )
        if set_id != _NO_SET:
            raise CorruptError(f"single file with set id {set_id.hex()}, allowed zero")
        if file_size > actual_size:
            raise TruncatedError(
                f"file of {actual_size} bytes should have {file_size}; copy it again"
            )
        if file_size < actual_size:
            raise CorruptError(
                f"file of {actual_size} bytes should have {file_size}; bytes follow it"
            )
        if header_size > MAX_HEADER_SIZE:
            raise CorruptError(f"header of {header_size} bytes, allowed {MAX_HEADER_SIZE}")
        if offset < PREAMBLE_SIZE or offset != align(offset) or offset + header_size != file_size:
            raise CorruptError(
                f"header at byte {offset:#x} of {header_size} bytes does not end "
                f"the file of {file_size}; the file is corrupt"
            )
        return cls(file_size, offset, header_size, crc32, (major, minor))

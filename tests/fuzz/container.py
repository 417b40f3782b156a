"""A container taken apart, changed anywhere, and put together again under right checksums."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cvxq_format.files import inflate
from cvxq_format.limits import PREAMBLE_SIZE, align
from cvxq_format.preamble import Preamble

KINDS = ("codebooks", "tensors", "files")


@dataclass
class Section:
    """A header entry, and the bytes that it stands for; of a deflated file the bytes inflated."""

    entry: dict[str, Any]
    data: bytes


class Container:
    """The sections of a file by kind, and what else its header says."""

    def __init__(self, whole: bytes) -> None:
        """Take a sound file apart."""
        preamble = Preamble.from_bytes(whole, len(whole))
        self.version = preamble.version
        self.header: dict[str, Any] = json.loads(whole[preamble.header_offset :])
        self.sections = {
            kind: [_section(entry, whole) for entry in self.header[kind]] for kind in KINDS
        }
        required = self.header["required"]
        self.header["required"] = [name for name in required if name != "deflated-files"]

    @staticmethod
    def of(whole: bytes) -> Container:
        """Take a sound file apart, or copy what that gave the last time."""
        copy: Container = pickle.loads(_pickled(whole))
        return copy

    def file(self, name: str) -> Section | None:
        """Return the carried file of this name."""
        return next((s for s in self.sections["files"] if s.entry.get("name") == name), None)

    def carry(self, name: str, data: bytes) -> None:
        """Add a file, or change the one of this name."""
        section = self.file(name)
        if section is None:
            self.sections["files"].append(Section({"name": name}, data))
        else:
            section.data = data

    def drop(self, name: str) -> None:
        """Leave the file of this name out."""
        kept = [s for s in self.sections["files"] if s.entry.get("name") != name]
        self.sections["files"] = kept

    def seal(self, change: Callable[[dict[str, Any]], bytes | None] | None = None) -> bytes:
        """Return the file: sections laid out anew, every checksum right.

        change: may change the header when all of it is said, or return its bytes instead.
        """
        body, header = bytearray(PREAMBLE_SIZE), dict(self.header)
        for kind in KINDS:
            header[kind] = [_placed(section, body) for section in self.sections[kind]]
        body += bytes(align(len(body)) - len(body))
        text = (change and change(header)) or json.dumps(header).encode()
        preamble = Preamble(
            len(body) + len(text), len(body), len(text), zlib.crc32(text), self.version
        )
        body[:PREAMBLE_SIZE] = preamble.to_bytes()
        return bytes(body) + text


@lru_cache(maxsize=256)
def _pickled(whole: bytes) -> bytes:
    return pickle.dumps(Container(whole), pickle.HIGHEST_PROTOCOL)


def _section(entry: dict[str, Any], whole: bytes) -> Section:
    data = whole[entry["offset"] : entry["offset"] + entry["size"]]
    size = entry.pop("inflated_size", None)
    return Section(entry, data if size is None else inflate(memoryview(data), size))


def _placed(section: Section, body: bytearray) -> dict[str, Any]:
    body += bytes(align(len(body)) - len(body))
    place = {"offset": len(body), "size": len(section.data), "crc32": zlib.crc32(section.data)}
    body += section.data
    return {**section.entry, **place}

"""The header: one JSON object that names every section."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cvxq_format.entries import (
    CodebookEntry,
    CompandedEntry,
    FileEntry,
    Section,
    TensorEntry,
    check_tensor_name,
    read_codebook_entry,
    read_file_entry,
    read_tensor_entry,
)
from cvxq_format.errors import CorruptError, UnsupportedError
from cvxq_format.json_strict import Fields, canonical, parse
from cvxq_format.limits import FEATURES, MAX_CODEBOOKS, PREAMBLE_SIZE, align

_FEATURE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


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
        return canonical(
            {
                "required": self.required,
                "optional": self.optional,
                "tensors": [entry.to_json() for entry in self.tensors],
                "aliases": dict(self.aliases),
                "added_biases": self.added_biases,
                "codebooks": [entry.to_json() for entry in self.codebooks],
                "files": [entry.to_json() for entry in self.files],
            }
        )

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
                raise CorruptError(
                    f"header: feature name {feature[:80]!r} is malformed, allowed a to z, "
                    "0 to 9 and '-'; the file is corrupt"
                )
        for feature in required:
            if feature not in FEATURES:
                raise UnsupportedError(
                    f"the file requires feature {feature!r}, unknown to this reader; update cvxq"
                )
        header = cls(
            required=tuple(required),
            optional=tuple(optional),
            codebooks=tuple(
                read_codebook_entry(Fields(f"header, codebooks[{i}]", item, lenient))
                for i, item in enumerate(fields.items("codebooks"))
            ),
            tensors=tuple(
                read_tensor_entry(Fields(f"header, tensors[{i}]", item, lenient))
                for i, item in enumerate(fields.items("tensors"))
            ),
            aliases=tuple(sorted(fields.mapping("aliases").items())),
            added_biases=tuple(fields.texts("added_biases")),
            files=tuple(
                read_file_entry(Fields(f"header, files[{i}]", item, lenient))
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
                raise CorruptError(
                    f"header: alias {alias!r} of {target!r}, which is no tensor; "
                    "the file is corrupt"
                )
        for name in self.added_biases:
            if name not in tensors or tensors[name].codec != "raw":
                raise CorruptError(
                    f"header: added bias {name!r} is not a raw tensor; the file is corrupt"
                )
        for entry in self.tensors:
            if isinstance(entry, CompandedEntry) and entry.codebook >= len(self.codebooks):
                raise CorruptError(
                    f"tensor {entry.name!r}: codebook {entry.codebook}, "
                    f"the file has {len(self.codebooks)}; the file is corrupt"
                )

    def used_features(self) -> set[str]:
        """Return the features that some entry uses; they belong into `required`."""
        entries: tuple[Section, ...] = (*self.codebooks, *self.tensors, *self.files)
        return {feature for entry in entries for feature in entry.used_features()}

    def check_features(self, minor: int) -> None:
        """Raise CorruptError unless the features required are the ones used, in a file of `minor`.

        Features that this reader does not know are left out.
        """
        named: list[tuple[str, Section]] = [
            *((f"codebook {i}", entry) for i, entry in enumerate(self.codebooks)),
            *((f"tensor {entry.name!r}", entry) for entry in self.tensors),
            *((f"file {entry.name!r}", entry) for entry in self.files),
        ]
        for where, entry in named:
            for feature, key in entry.used_features().items():
                if feature not in self.required:
                    raise CorruptError(
                        f"header: {where} has key {key!r} of feature {feature!r}, "
                        "which is not required; the file is corrupt"
                    )
        for feature in sorted(FEATURES.keys() & set(self.required)):
            if feature not in self.used_features():
                raise CorruptError(
                    f"header: feature {feature!r} is required, but nothing uses it; "
                    "the file is corrupt"
                )
            if minor < FEATURES[feature]:
                raise CorruptError(
                    f"header: feature {feature!r} in a file of version 1.{minor}, allowed from "
                    f"1.{FEATURES[feature]} on; the file is corrupt"
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


def _check_distinct(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CorruptError(f"header: {what} {name!r} appears twice; the file is corrupt")
        seen.add(name)

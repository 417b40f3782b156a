"""Files that a reader must refuse, each a valid file with exactly one thing wrong.

All checksums are right unless the checksum is the fault, so that every check behind them is
reached. `make_vectors.py` writes them out.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Fault = tuple[str, bytes, str, str]

PREAMBLE = struct.Struct("<8sHHIQQQI16sII40s16s")
NAN, INFINITY = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"


class Draft:
    """A file taken apart: `header` as JSON, `body` as the bytes between preamble and header."""

    def __init__(self, data: bytes) -> None:
        fields = PREAMBLE.unpack(data[:124])
        self.minor, offset, size = fields[2], *fields[5:7]
        self.body = bytearray(data[:offset])
        self.header: dict[str, Any] = json.loads(data[offset : offset + size])

    def seal(self, header: bytes | None = None, **preamble: Any) -> bytes:
        """Put the file together with fresh checksums; `preamble` overrides single fields."""
        if header is None:
            text = json.dumps(self.header, sort_keys=True, separators=(",", ":"))
            header = text.encode("ascii")
        fields = {
            "magic": b"\x89CVXQ\r\n\x1a",
            "major": 1,
            "minor": self.minor,
            "preamble_size": 128,
            "file_size": len(self.body) + len(header),
            "header_offset": len(self.body),
            "header_size": len(header),
            "header_crc32": zlib.crc32(header),
            "set_id": bytes(16),
            "file_index": 0,
            "file_count": 1,
            "reserved": bytes(40),
            "unused": bytes(16),
        }
        start = PREAMBLE.pack(*(fields | preamble).values())
        return start + struct.pack("<I", zlib.crc32(start)) + self.body[128:] + header

    def patch(self, kind: str, index: int, at: int, data: bytes) -> Draft:
        """Overwrite bytes of a section, from its end if `at` is negative; renew its checksum."""
        entry = self.header[kind][index]
        start = entry["offset"] + (at if at >= 0 else entry["size"] + at)
        self.body[start : start + len(data)] = data
        section = self.body[entry["offset"] : entry["offset"] + entry["size"]]
        entry["crc32"] = zlib.crc32(section)
        return self

    def replace(self, kind: str, index: int, data: bytes, **values: Any) -> Draft:
        """Put other bytes in place of the file's last section; change keys of its entry."""
        entry = self.header[kind][index]
        del self.body[entry["offset"] :]
        self.body += data + bytes(-len(data) % 64)
        entry |= {"size": len(data), "crc32": zlib.crc32(data), **values}
        return self

    def set(self, kind: str, index: int, **values: Any) -> Draft:
        """Change keys of one header entry."""
        self.header[kind][index] |= values
        return self

    def set_header(self, **values: Any) -> Draft:
        """Change keys of the header itself."""
        self.header |= values
        return self


def faulty_vectors(valid: Path) -> Iterator[Fault]:
    """Yield (name, bytes, class of error, piece of its text) made from the valid vectors."""
    yield from _preamble_faults((valid / "bias-added.cvxq").read_bytes())
    yield from _json_faults((valid / "bias-added.cvxq").read_bytes())
    yield from _header_faults(valid)
    yield from _layout_faults(valid)
    yield from _codebook_faults((valid / "depths-explicit.cvxq").read_bytes())
    yield from _payload_faults(valid)
    yield from _feature_faults(valid)


def _preamble_faults(good: bytes) -> Iterator[Fault]:
    def sealed(**fields: Any) -> bytes:
        return Draft(good).seal(**fields)

    flipped = bytearray(good)
    flipped[20] ^= 1
    corrupt = "CorruptError"
    yield "file-empty", b"", "NotCvxqError", "empty file"
    yield "file-of-another-kind", b"\x89PNG\r\n\x1a\n" + good[8:], "NotCvxqError", "89 50 4e 47"
    yield "magic-line-ends-changed", good.replace(b"\r\n", b"\n", 1), "NotCvxqError", "89 43"
    yield "truncated-in-preamble", good[:100], "TruncatedError", "ends inside its preamble"
    yield "truncated-in-header", good[:-1], "TruncatedError", f"should have {len(good)}"
    yield "trailing-byte", good + b"\0", corrupt, "bytes follow"
    yield "preamble-checksum", bytes(flipped), corrupt, "preamble"
    yield "newer-major", sealed(major=2), "UnsupportedError", "version 2.0"
    yield "older-major", sealed(major=0), "UnsupportedError", "version 0.0"
    yield "preamble-size", sealed(preamble_size=256), corrupt, "preamble size 256"
    yield "preamble-reserved-bytes", sealed(reserved=b"\1" + bytes(39)), corrupt, "reserved"
    set_id = bytes(range(16))
    split = sealed(set_id=set_id, file_index=1, file_count=3)
    yield "split-set", split, "UnsupportedError", f"file 2 of 3 of split set {set_id.hex()}"
    yield "file-index-past-count", sealed(file_index=1), corrupt, "file index 1 of 1"
    yield "file-count-zero", sealed(file_count=0), corrupt, "file index 0 of 0"
    yield "set-id-in-single-file", sealed(set_id=set_id), corrupt, "set id"
    yield "header-checksum", sealed(header_crc32=0), corrupt, "header at byte"
    yield "header-giant", sealed(header_size=1 << 50), corrupt, "header of"
    yield "header-past-end", sealed(header_offset=1 << 40), corrupt, "header at byte"
    yield "header-offset-wraps", sealed(header_offset=(1 << 64) - 64), corrupt, "header at byte"
    yield "file-size-giant", sealed(file_size=1 << 62), "TruncatedError", "should have"


def _json_faults(good: bytes) -> Iterator[Fault]:
    text = Draft(good).seal()[len(Draft(good).body) :]

    def fault(name: str, old: bytes, new: bytes, message: str) -> Fault:
        changed = text.replace(old, new, 1)
        assert changed != text, name
        return name, Draft(good).seal(changed), "CorruptError", message

    yield fault("json-cut-short", text[-5:], b"", "not valid JSON")
    yield fault("json-not-utf8", b"fc.bias", b"fc.\xff", "not valid JSON")
    yield fault("json-duplicate-key", b'"files":[]', b'"files":[],"files":[]', "appears twice")
    yield fault("json-deep-nesting", b'"files":[]', b'"files":' + b"[" * 9999, "nests deeper")
    yield fault("json-open-string", text[-9:], b'"\\' * 9999, "not valid JSON")
    yield fault("json-nan", b'"size":8', b'"size":NaN', "NaN")
    yield fault("json-float", b'"size":8', b'"size":8.0', "8.0")
    yield fault("json-5000-digits", b'"size":8', b'"size":' + b"8" * 5000, "5000 digits")
    yield fault("json-boolean-as-integer", b'"size":8', b'"size":true', "allowed an integer")
    yield fault("json-negative-offset", b'"offset":128', b'"offset":-1', "allowed an integer")
    yield fault("json-string-as-list", b'"shape":[2]', b'"shape":"2"', "allowed a list")
    yield fault("json-missing-key", b'"files":[],', b"", "lacks key 'files'")
    yield fault("json-unknown-key", b'"files":[]', b'"files":[],"later":1', "key 'later'")
    yield fault("json-text-after-end", text, text + b"{}", "not valid JSON")
    yield fault("json-not-an-object", text, b"[]", "allowed an object")


def _header_faults(valid: Path) -> Iterator[Fault]:
    raw = (valid / "bias-added.cvxq").read_bytes()
    matrix = (valid / "depths-explicit.cvxq").read_bytes()
    alias = (valid / "alias.cvxq").read_bytes()
    files = (valid / "files-verbatim.cvxq").read_bytes()

    def head(name: str, message: str, **keys: Any) -> Fault:
        return name, Draft(raw).set_header(**keys).seal(), "CorruptError", message

    def tensor(vector: str, message: str, /, **keys: Any) -> Fault:
        return vector, Draft(matrix).set("tensors", 0, **keys).seal(), "CorruptError", message

    later, refused = "from-the-future", "UnsupportedError"
    required = Draft(raw).set_header(required=[later]).seal()
    yield "unknown-required-feature", required, refused, later
    unknown = Draft(raw).set("tensors", 0, codec=later).seal()
    yield "unknown-codec", unknown, refused, f"'fc.bias' has codec '{later}'"
    transform = Draft(matrix).set("tensors", 0, input_transform=later).seal()
    yield (
        "unknown-input-transform",
        transform,
        refused,
        f"'layer.weight' has input transform '{later}'",
    )
    yield head("feature-name-malformed", "malformed", optional=["Not a name"])
    yield head("feature-twice", "appears twice", optional=["a", "a"])
    yield head("added-bias-of-nothing", "added bias 'no.bias'", added_biases=["no.bias"])
    yield head("alias-of-nothing", "alias 'a' of 'b'", aliases={"a": "b"})
    clash = Draft(alias).set_header(aliases={"embed.weight": "embed.weight"}).seal()
    yield "alias-named-like-tensor", clash, "CorruptError", "appears twice"
    chain = {"a": "embed.weight", "b": "a"}
    chained = Draft(alias).set_header(aliases=chain).seal()
    yield "alias-of-alias", chained, "CorruptError", "alias 'b' of 'a'"
    for name, path in (
        ("file-name-climbs", "../config.json"),
        ("file-name-absolute", "/config.json"),
        ("file-name-two-folders", "a/b/c"),
        ("file-name-too-long", "a" * 256),
    ):
        climbing = Draft(files).set("files", 0, name=path).seal()
        yield name, climbing, "CorruptError", "file name"
    twice = Draft(files).set("files", 1, name="chat_template.jinja").seal()
    yield "file-name-twice", twice, "CorruptError", "appears twice"
    yield tensor("tensor-name-empty", "tensor name", name="")
    yield tensor("tensor-name-too-long", "tensor name", name="n" * 513)
    yield tensor("tensor-name-control-character", "tensor name", name="a\nb")
    yield tensor("tensor-name-lone-surrogate", "tensor name", name="\ud800")
    yield tensor("shape-giant", "shape", shape=[1 << 40, 1 << 40])
    yield tensor("shape-zero", "dimension 0", shape=[0, 6])
    yield tensor("shape-of-one-dimension", "1 dimensions", shape=[96])
    yield tensor("weights-per-byte-giant", "allowed 4096 per byte", shape=[1 << 16, 1 << 16])
    yield tensor("group-size-zero", "'group_size'", group_size=0)
    yield tensor("partitions-not-dividing", "3 partitions", partitions=3)
    yield tensor("partitions-transposed", "allowed 1", partitions=2, transposed=True)
    yield tensor("explicit-with-column-bits", "explicit depths", column_bits=2)
    yield tensor("codebook-missing", "codebook 1", codebook=1)
    yield tensor("orientation-unknown", "source_orientation", source_orientation="sideways")
    size = Draft(raw).set("tensors", 0, shape=[3]).seal()
    yield "raw-size-differs", size, "CorruptError", "f32 [3] needs 12"
    dtype = Draft(raw).set("tensors", 0, dtype="f8").seal()
    yield "raw-dtype-unknown", dtype, "CorruptError", "'dtype': 'f8'"


def _layout_faults(valid: Path) -> Iterator[Fault]:
    raw = (valid / "raw-dtypes.cvxq").read_bytes()

    def fault(name: str, draft: Draft, message: str) -> Fault:
        return name, draft.seal(), "CorruptError", message

    yield fault("sections-overlap", Draft(raw).set("tensors", 1, offset=128), "'int-i1' starts at")
    yield fault("section-misaligned", Draft(raw).set("tensors", 1, offset=136), "'int-i1' starts")
    giant = Draft(raw).set("tensors", 0, size=1 << 48, shape=[1 << 40, 256])
    yield fault("section-past-end", giant, "'int-i1' starts")
    swapped = Draft(raw)
    swapped.header["tensors"].reverse()
    yield fault("sections-unordered", swapped, "not listed by offset")
    gap = Draft(raw)
    gap.body += bytes(64)
    yield fault("gap-before-header", gap, "header starts at")
    unlisted = Draft(raw)
    del unlisted.header["tensors"][2]
    yield fault("section-unlisted", unlisted, "starts at")
    padding = Draft(raw)
    padding.body[128 + 6] = 1
    yield fault("padding-not-zero", padding, "padding at byte 0x86 after tensor 'int-u1'")
    flipped = Draft(raw)
    flipped.body[128] ^= 1
    yield fault("tensor-checksum", flipped, "tensor 'int-u1' at byte 0x80: checksum")
    index = [entry["name"] for entry in swapped.header["tensors"]][::-1].index("bool")
    two = Draft(raw).patch("tensors", index, 0, b"\2")
    yield fault("raw-bool-byte-2", two, "bool byte 2")


def _codebook_faults(good: bytes) -> Iterator[Fault]:
    def fault(name: str, at: int, data: bytes, message: str) -> Fault:
        draft = Draft(good).patch("codebooks", 0, at, data)
        return name, draft.seal(), "CorruptError", f"codebook 0 at byte 0x80: {message}"

    levels = 16 + 32
    yield fault("codebook-scale-negative-zero", 0, b"\0\0\0\x80", "scale table starts at")
    yield fault("codebook-scale-infinite", 12, INFINITY, "scale table holds a value")
    yield fault("codebook-scales-equal", 4, bytes(4), "scale table is not strictly")
    yield fault("codebook-thresholds-decrease", 16 + 4, bytes(4), "depth thresholds decrease")
    yield fault("codebook-level-nan", levels, NAN, "level table 1 holds a value")
    yield fault("codebook-levels-unsorted", levels + 8, b"\0\0\x80\x7e", "level table 2 is not")
    sized = Draft(good).set("codebooks", 0, scale_bits=3).seal()
    yield "codebook-size-differs", sized, "CorruptError", "3 scale bits need"
    flipped = Draft(good)
    flipped.body[128 + 500] ^= 4
    yield "codebook-checksum", flipped.seal(), "CorruptError", "codebook 0 at byte 0x80: checksum"


def _payload_faults(valid: Path) -> Iterator[Fault]:
    def fault(source: str, name: str, at: int, data: bytes, message: str) -> Fault:
        draft = Draft((valid / f"{source}.cvxq").read_bytes()).patch("tensors", 0, at, data)
        return name, draft.seal(), "CorruptError", f"tensor 'layer.weight' at byte 0x8c0: {message}"

    # (16, 6) in clusters of 8: 12 groups; unit, step, depths 6 bytes, scale codes 3, planes.
    explicit = "depths-explicit"
    yield fault(explicit, "scale-unit-nan", 0, NAN, "scale unit nan")
    yield fault(explicit, "scale-unit-negative", 0, b"\0\0\x80\xbf", "scale unit -1.0")
    yield fault(explicit, "scale-unit-overflows", 0, b"\xff\xff\x7f\x7f", "scale unit")
    yield fault(explicit, "mean-step-infinite", 4, INFINITY, "mean step inf")
    yield fault(explicit, "mean-step-without-means", 4, b"\0\0\x80\x3f", "mean step 1.0 without")
    yield fault(explicit, "depth-9", 8, b"\x99", "bit depth 9")
    yield fault(explicit, "codes-too-many-or-few", 8, b"\0\0\0\0\0\0", "39 bytes of codes")
    # (5, 4) in one cluster: 4 groups; depths 2 bytes, scale codes 1, planes with 3 spare bits.
    yield fault("cluster-one-short", "spare-bits-in-plane", -1, b"\xff", "spare bits in the codes")
    # (8, 3) in clusters of 4: 6 groups; depths 3 bytes, 12 bits of scale codes in 2 bytes.
    yield fault("scale-zero", "spare-bits-in-stream", 12, b"\xf0", "spare bits at the end")
    # (11, 4): 12 groups; depths 6 bytes, scale codes 3, then 11 entries of 4 bits.
    odd = "permutation-odd-rows"
    yield fault(odd, "permutation-past-partition", 17, b"\xff", "permutation entry 15")
    yield fault(odd, "permutation-repeats-row", 17, b"\x11", "permutation leaves out row")
    cut = Draft((valid / "depths-explicit.cvxq").read_bytes())
    cut.set("tensors", 0, size=12, crc32=zlib.crc32(cut.body[0x8C0 : 0x8C0 + 12]))
    del cut.body[0x900:]
    yield "side-information-too-long", cut.seal(), "CorruptError", "side information alone needs"


def _feature_faults(valid: Path) -> Iterator[Fault]:
    """Faults of the features, and of what version 1.1 added."""

    def draft(source: str) -> Draft:
        return Draft((valid / f"{source}.cvxq").read_bytes())

    def tensor(name: str, source: str, message: str, **keys: Any) -> Fault:
        return name, draft(source).set("tensors", 0, **keys).seal(), "CorruptError", message

    def payload(name: str, source: str, at: int, data: bytes, message: str) -> Fault:
        patched = draft(source).patch("tensors", 0, at, data).seal()
        return name, patched, "CorruptError", f"tensor 'layer.weight' at byte 0x8c0: {message}"

    later = Draft((valid / "bias-added.cvxq").read_bytes()).set_header(later=1)
    yield "json-unknown-key-of-minor-1", later.seal(minor=1), "CorruptError", "key 'later'"
    for source, key, feature, minor in (
        ("row-scales", "row_scale_bits", "row-scales", 1),
        ("cluster-map", "cluster_map", "cluster-maps", 1),
        ("codebook-short", "level_depths", "short-codebooks", 1),
        ("files-deflated", "inflated_size", "deflated-files", 2),
    ):
        message = f"has key '{key}' of feature '{feature}', which is not required"
        unlisted = draft(source).set_header(required=[]).seal()
        yield f"{feature}-not-required", unlisted, "CorruptError", message
        unused = draft("bias-added").set_header(required=[feature]).seal(minor=minor)
        message = f"feature '{feature}' is required, but nothing uses it"
        yield f"{feature}-not-used", unused, "CorruptError", message
        older = draft(source).seal(minor=minor - 1)
        message = f"feature '{feature}' in a file of version 1.{minor - 1}"
        yield f"{feature}-in-1.{minor - 1}", older, "CorruptError", message

    for bits in (0, 9):
        message = f"'row_scale_bits': {bits}, allowed an integer from 1 to 8"
        yield tensor(f"row-scale-bits-{bits}", "row-scales", message, row_scale_bits=bits)
    yield tensor(
        "row-scales-transposed",
        "cluster-map-transposed",
        "row scales of a transposed matrix",
        row_scale_bits=3,
    )
    # (11, 4): 12 groups; unit, step, depths 6 bytes, scale codes 3, row scales 55 bits in 7.
    spare = "spare bits at the end"
    yield payload("row-scales-spare-bit", "row-scales", 23, b"\x80", spare)
    message = "bytes of codes, the bit depths need"
    yield tensor("row-scales-fewer-bits", "row-scales-of-8-bits", message, row_scale_bits=7)

    yield tensor("cluster-map-false", "cluster-map", "allowed true", cluster_map=False)
    yield tensor("cluster-map-not-permuted", "cluster-map", "not permuted", permuted=False)
    message = "a cluster map with one cluster per partition"
    yield tensor("cluster-map-of-one-cluster", "cluster-map", message, group_size=16)
    # (16, 4) in clusters of 4: 16 groups; depths 8 bytes, scale codes 4, 16 entries of 2 bits.
    message = "cluster map names cluster 0 of expert 0"
    yield payload("cluster-map-names-too-often", "cluster-map", 20, b"\0\0", message)
    # (20, 3) in 2 partitions of 3 clusters: 18 groups; depths 9, scale codes 5, 20 entries.
    message = "cluster map entry 3, a partition has 3 clusters"
    yield payload("cluster-map-past-partition", "cluster-map-of-partitions", 22, b"\xff", message)
    # (3, 4) in clusters of 1: 12 groups; depths 6, scale codes 3, 3 entries in 6 bits.
    yield payload("cluster-map-spare-bits", "cluster-map-of-one-row", 17, b"\xff", spare)

    def book(name: str, message: str, **keys: Any) -> Fault:
        changed = draft("codebook-short").set("codebooks", 0, **keys)
        return name, changed.seal(), "CorruptError", message

    yield book("level-depths-other-size", "need 232 with level depths 0x17", level_depths=0b10111)
    yield book("level-depths-all", "allowed an integer from 0 to 254", level_depths=255)
    yield book("level-depths-negative", "allowed an integer from 0 to 254", level_depths=-1)
    # Scales 16 bytes, thresholds 32, then the tables of depths 2, 3 and 5.
    unsorted = draft("codebook-short").patch("codebooks", 0, 48 + 16, b"\0\0\x80\x7e")
    yield (
        "codebook-short-unsorted",
        unsorted.seal(),
        "CorruptError",
        "level table 3 is not strictly",
    )

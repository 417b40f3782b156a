"""One hostile file from a seed: a sound one, changed once or a few times.

Every mutation is a function of a container, the sound files and a generator; those of `WHOLE` work
on finished bytes instead, and leave checksums as they are.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from random import Random
from typing import Any

from tests.fuzz import json_mutations
from tests.fuzz.container import Container, Section
from tests.fuzz.programs import any_template, hostile_tokenizer

Change = Callable[[Container, Sequence[bytes], Random], None]
Finish = Callable[[dict[str, Any]], bytes | None]

_FLOATS = (float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, 0.0)
_LARGEST_TENSOR = 1 << 26  # bytes
_DTYPES = ("f32", "f16", "bf16", "f64", "i8", "u8", "i64", "bool", "complex", "F32")
_EXTRA_FILES = {
    "vocab.txt": b"[UNK]\n[CLS]\nhello\n",
    "added_tokens.json": b'{"<x>": 99}',
    "special_tokens_map.json": b'{"bos_token": {"content": 7}}',
    "tokenizer.model": b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02" * 3,
    "tekken.json": b'{"vocab": [], "config": {"pattern": "("}}',
    "merges.txt": b"#version\nh e\n" * 100,
    "vocab.json": b'{"h": 0, "e": 4294967295}',
    "modeling_evil.py": b"raise SystemExit('ran')",
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
    "processor_config.json": b"{}",
}


def change_payload(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """Bytes of a tensor."""
    _bytes_of(_any(container, "tensors", rng), rng)


def change_codebook(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """Bytes of a codebook."""
    _bytes_of(_any(container, "codebooks", rng), rng)


def change_entry(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """What the header says of a tensor or a codebook."""
    kind = rng.choice(["tensors", "tensors", "tensors", "codebooks", "files"])
    section = _any(container, kind, rng)
    if section is None:
        return
    alter = rng.choice([json_mutations.change, json_mutations.change_number])
    entry = alter(section.entry, rng)
    section.entry = entry if isinstance(entry, dict) else {}
    if "dtype" in section.entry and rng.random() < 0.3:
        section.entry["dtype"] = rng.choice(_DTYPES)


def change_shape(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """A tensor of another shape, whose bytes follow it where they are plain."""
    section = _any(container, "tensors", rng)
    shape = section.entry.get("shape") if section else None
    if section is None or not isinstance(shape, list) or not shape:
        return
    if not all(isinstance(dimension, int) for dimension in shape):
        return
    at = rng.randrange(len(shape))
    shape[at] = max(0, min(1 << 30, rng.choice([shape[at] - 1, shape[at] + 1, shape[at] * 2, 1])))
    if section.entry.get("codec") == "raw" and len(section.data) < 1 << 20:
        count = 1
        for dimension in shape:
            count *= dimension
        size = count * {"f32": 4, "bf16": 2, "f16": 2}.get(str(section.entry.get("dtype")), 1)
        if size < _LARGEST_TENSOR:
            section.data = (section.data * (1 + size // max(1, len(section.data))))[:size]


def swap_tensors(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """The bytes, or the names, of two tensors exchanged."""
    one, other = _any(container, "tensors", rng), _any(container, "tensors", rng)
    if one is None or other is None:
        return
    if rng.random() < 0.5:
        one.data, other.data = other.data, one.data
    else:
        one.entry, other.entry = other.entry, one.entry
        one.data, other.data = other.data, one.data
        names = one.entry.get("name"), other.entry.get("name")
        one.entry["name"], other.entry["name"] = names[1], names[0]


def graft_section(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """A section of another file, in place of one here or beside it."""
    donor, kind = Container.of(rng.choice(files)), rng.choice(["tensors", "files", "files"])
    given = _any(donor, kind, rng)
    if given is None:
        return
    if kind == "files":
        container.carry(given.entry["name"], given.data)
    elif rng.random() < 0.5:
        container.sections[kind].append(given)
    else:
        here = _any(container, kind, rng)
        if here is not None:
            here.entry = {**given.entry, "name": here.entry.get("name")}
            here.data = given.data


def drop_section(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """A section left out."""
    sections = container.sections[rng.choice(["tensors", "files", "files", "codebooks"])]
    if sections:
        del sections[rng.randrange(len(sections))]


def change_names(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """Names further than the sections: aliases, added biases, features."""
    key = rng.choice(["aliases", "added_biases", "required", "optional"])
    names = [str(s.entry.get("name")) for s in container.sections["tensors"]] or ["x"]
    value = container.header.get(key)
    if key == "aliases" and isinstance(value, dict):
        value[rng.choice([*names, "lm_head.weight", "x"])] = rng.choice([*names, "nowhere"])
    elif isinstance(value, list):
        value.append(rng.choice([*names, "row-scales", "deflated-files", "later-feature"]))
    if rng.random() < 0.3:
        container.header[key] = json_mutations.any_value(rng, value)


def change_version(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """Another version of the format."""
    container.version = (rng.choice([1, 1, 1, 0, 2]), rng.choice([0, 1, 2, 3, 9, 65535]))


def change_carried(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """Bytes of a carried file."""
    _bytes_of(_any(container, "files", rng), rng)


def add_file(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """A file that tokenizers look for."""
    name = rng.choice(list(_EXTRA_FILES))
    container.carry(name, _EXTRA_FILES[name])


def change_template(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """Another chat template."""
    container.carry("chat_template.jinja", any_template(rng).encode("utf-8", "surrogatepass"))


def change_tokenizer(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """A tokenizer that asks for more than it should."""
    document = _document(container, "tokenizer.json")
    if document:
        data = json_mutations.written(hostile_tokenizer(document, rng), rng)
        container.carry("tokenizer.json", data)


def _json_of(name: str) -> Change:
    def change(container: Container, files: Sequence[bytes], rng: Random) -> None:
        document: Any = _document(container, name)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            alter = rng.choice([json_mutations.change, json_mutations.change_number])
            with suppress(RecursionError):  # a document that nests too deep for a copy stays
                document = alter(document, rng)
                if len(json.dumps(document)) > json_mutations.LARGEST:
                    break
        container.carry(name, json_mutations.written(document, rng))

    return change


def change_type(container: Container, files: Sequence[bytes], rng: Random) -> None:
    """The config of another architecture, the numbers kept."""
    document = {
        **_document(container, "config.json"),
        "model_type": rng.choice(json_mutations.TYPES),
    }
    container.carry("config.json", json.dumps(document).encode())


def deflated(container: Container, rng: Random) -> Finish:
    """Carry a deflated file, whose entry may say another size."""
    data = _zeros_deflated(1 << rng.randrange(4, 24))
    container.carry("zeros.bin", data[: rng.choice([len(data), len(data), len(data) // 2])])
    size = rng.choice([1 << rng.randrange(4, 24), 1 << 28, 1 << 40, 0, -1])

    def change(header: dict[str, Any]) -> None:
        header["required"] = [*header["required"], "deflated-files"]
        header["files"][-1]["inflated_size"] = size

    return change


@cache
def _zeros_deflated(size: int) -> bytes:
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packed.compress(bytes(size)) + packed.flush()


_PLAIN: dict[str, Change] = {
    "payload": change_payload,
    "codebook": change_codebook,
    "entry": change_entry,
    "shape": change_shape,
    "swap": swap_tensors,
    "graft": graft_section,
    "drop": drop_section,
    "header": change_names,
    "version": change_version,
    "carried": change_carried,
    "extra-file": add_file,
    "template": change_template,
    "hostile-tokenizer": change_tokenizer,
    "config": _json_of("config.json"),
    "record": _json_of("decoder.json"),
    "generation-config": _json_of("generation_config.json"),
    "tokenizer": _json_of("tokenizer.json"),
    "tokenizer-config": _json_of("tokenizer_config.json"),
    "report": _json_of("report.json"),
    "model-type": change_type,
}
WHOLE = ("flip", "truncate", "extend", "splice")
SPECIAL = ("deflated", "header-bytes", "header-json", "no-record")
KINDS = (*_PLAIN, *WHOLE, *SPECIAL)


def kind_of(seed: int, index: int) -> str:
    """Return the first mutation of case `index` of `seed`, without making its file."""
    return _generator(seed, index).choice(KINDS)


def _generator(seed: int, index: int) -> Random:
    return Random((seed << 40) + index)


def hostile_file(seed: int, index: int, files: Sequence[bytes]) -> tuple[str, bytes]:
    """Return case `index` of `seed`: the kinds of its mutations, and the file."""
    rng = _generator(seed, index)
    kind = rng.choice(KINDS)
    base = rng.choice(files)
    if kind in WHOLE:
        return kind, _whole(kind, base, files, rng)
    container = Container.of(base)
    finish: Finish | None = None
    if kind in _PLAIN:
        kinds = [kind, *rng.choices(list(_PLAIN), k=rng.choice([0, 0, 0, 1, 2]))]
        for name in kinds:
            _PLAIN[name](container, files, rng)
        return "+".join(kinds), container.seal()
    if kind == "deflated":
        finish = deflated(container, rng)
    elif kind == "no-record":
        container.drop("decoder.json")
    elif kind == "header-json":
        finish = partial(_header_as_json, rng)
    else:
        finish = partial(_header_as_bytes, rng)
    return kind, container.seal(finish)


def _header_as_json(rng: Random, header: dict[str, Any]) -> bytes:
    return json_mutations.written(json_mutations.change(header, rng), rng)


def _header_as_bytes(rng: Random, header: dict[str, Any]) -> bytes:
    return _changed(json.dumps(header).encode(), rng)


def _whole(kind: str, base: bytes, files: Sequence[bytes], rng: Random) -> bytes:
    at = rng.randrange(len(base))
    if kind == "truncate":
        return base[:at]
    if kind == "extend":
        return base + rng.randbytes(rng.randrange(1, 200))
    if kind == "splice":
        other = rng.choice(files)
        return base[:at] + other[rng.choice([at, rng.randrange(len(other))]) :]
    return _changed(base, rng)


def _document(container: Container, name: str) -> dict[str, Any]:
    """The JSON object that a container carries; empty for anything else, earlier changes' work."""
    section = container.file(name)
    try:
        document = json.loads(section.data) if section else {}
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _any(container: Container, kind: str, rng: Random) -> Section | None:
    sections = container.sections[kind]
    return rng.choice(sections) if sections else None


def _bytes_of(section: Section | None, rng: Random) -> None:
    if section is not None and section.data:
        section.data = _changed(section.data, rng)


def _changed(data: bytes, rng: Random) -> bytes:
    """Return `data` with some of it replaced."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed))
        how = rng.randrange(6)
        if how == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed[at : at + 4] = struct.pack("<f", rng.choice(_FLOATS))[: len(changed) - at]
        elif how == 2:
            run = min(len(changed) - at, 1 << rng.randrange(12))
            changed[at : at + run] = bytes([rng.choice([0, 255, 127, 1])]) * run
        elif how == 3:
            run = min(len(changed) - at, 1 << rng.randrange(8))
            changed[at : at + run] = rng.randbytes(run)
        elif how == 4:
            changed[at : at + rng.randrange(8)] = b""
        else:
            changed[at:at] = rng.randbytes(rng.randrange(1, 8))
        if not changed:
            return b"\0"
    return bytes(changed)

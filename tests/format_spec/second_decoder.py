"""A second decoder, written from FORMAT.md alone, section by section, in plain Python.

It shares no code with cvxq_format, reads the whole file at once and is slow; it exists to show that
the document suffices, and to be compared with the first decoder bit for bit.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

# Section 9.
ELEMENT = {
    "bool": 1,
    "u8": 1,
    "i8": 1,
    "i16": 2,
    "i32": 4,
    "i64": 8,
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
}


class RefusedError(Exception):
    """The file breaks a rule."""


def require(claim: bool, rule: str) -> None:
    if not claim:
        raise RefusedError(rule)


def f32(value: float) -> float:
    """Section 11: round to binary32. Sums and products of two binary32 are safe in binary64."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def stream(data: bytes, count: int, width: int) -> list[int]:
    """Section 3: a bit stream, least significant bit first."""
    whole = int.from_bytes(data, "little")
    require(whole >> (count * width) == 0, "spare bits of a stream")
    return [(whole >> (i * width)) & ((1 << width) - 1) for i in range(count)]


def ceil_log2(value: int) -> int:
    bits = 0
    while (1 << bits) < value:
        bits += 1
    return bits


# Section 7.2: the features of version 1.2: since when, and the key of an entry that uses each.
FEATURES = {
    "cluster-maps": (1, "cluster_map"),
    "deflated-files": (2, "inflated_size"),
    "row-scales": (1, "row_scale_bits"),
    "short-codebooks": (1, "level_depths"),
}

# Section 11: r for v = 0, 1, 2, 3.
QUARTERS = struct.unpack(">4f", bytes.fromhex("3F800000 3F5744FD 3F3504F3 3F1837F0"))


def decode(path: Path) -> dict[str, Any]:
    """Return {"tensors": {name: {shape, dtype, data}}, "aliases", "files"}, data as hex."""
    data = path.read_bytes()
    header_offset, header = read_preamble_and_header(data)
    sections = sorted(
        [*header["codebooks"], *header["tensors"], *header["files"]],
        key=lambda entry: (entry["offset"], entry["size"]),
    )
    end = 128
    for section in [*sections, {"offset": header_offset, "size": 0}]:  # Section 5.
        start = (end + 63) // 64 * 64
        require(section["offset"] == start, "sections tile the file")
        require(not any(data[end:start]), "padding is zero")
        end = start + section["size"]
        if "crc32" in section:
            require(zlib.crc32(data[start:end]) == section["crc32"], "section CRC")
    books = [read_codebook(contents(data, entry), entry) for entry in header["codebooks"]]
    tensors = {}
    for entry in header["tensors"]:
        found = {"shape": entry["shape"], "dtype": entry.get("dtype", "f32")}
        if entry["codec"] == "raw":
            found["data"] = read_raw(contents(data, entry), entry).hex()
        else:
            require(entry["codec"] == "companded", "known codec")
            require(entry["input_transform"] == "none", "known input transform")
            weights = read_companded(contents(data, entry), entry, books[entry["codebook"]])
            found["data"] = struct.pack(f"<{len(weights)}f", *weights).hex()
        tensors[entry["name"]] = found
    files = {e["name"]: read_file(contents(data, e), e).hex() for e in header["files"]}
    return {"tensors": tensors, "aliases": header["aliases"], "files": files}


def contents(data: bytes, entry: dict[str, Any]) -> bytes:
    return data[entry["offset"] : entry["offset"] + entry["size"]]


def read_preamble_and_header(data: bytes) -> tuple[int, dict[str, Any]]:
    """Sections 6 and 7."""
    require(data[:8] == bytes.fromhex("89 43 56 58 51 0D 0A 1A"), "magic")
    require(len(data) >= 128, "whole preamble")
    require(struct.unpack_from("<I", data, 124)[0] == zlib.crc32(data[:124]), "preamble CRC")
    major, minor, size = struct.unpack_from("<HHI", data, 8)
    require(major == 1, "known major version")
    require(size == 128, "preamble size")
    file_size, offset, length, crc = struct.unpack_from("<QQQI", data, 16)
    index, count = struct.unpack_from("<II", data, 60)
    require(minor > 2 or not any(data[68:108]), "reserved bytes")
    require(count == 1 and index == 0 and not any(data[44:60]), "single file")
    require(file_size == len(data), "file size")
    require(offset % 64 == 0 and offset >= 128 and offset + length == file_size, "header place")
    text = data[offset:]
    require(zlib.crc32(text) == crc, "header CRC")
    header = json.loads(text)
    require(set(header["required"]) <= FEATURES.keys(), "required features")
    entries = [*header["codebooks"], *header["tensors"], *header["files"]]
    for feature, (since, key) in FEATURES.items():
        is_used = any(key in entry for entry in entries)
        require(is_used == (feature in header["required"]), "features used are those required")
        require(minor >= since or not is_used, "features need their minor version")
    return offset, header


def default_levels(depth: int) -> tuple[float, ...]:
    """Appendix A."""
    middle = 1 << (depth - 1)
    upper = [
        f32(-3 / math.sqrt(2) * math.log(1 - 2 * ((q + 0.5) / 2**depth - 0.5)))
        for q in range(middle, 2 * middle)
    ]
    return (*(-level for level in reversed(upper)), *upper)


def read_codebook(data: bytes, entry: dict[str, Any]) -> dict[str, Any]:
    """Sections 7.4 and 8."""
    scale_bits = entry["scale_bits"]
    stored = entry.get("level_depths", 255)
    require(0 <= entry.get("level_depths", 0) <= 254, "level depths")
    scales = struct.unpack_from(f"<{2**scale_bits}f", data)
    thresholds = struct.unpack_from("<8i", data, 4 * 2**scale_bits)
    levels: list[tuple[float, ...]] = [(0.0,)]
    at = 4 * 2**scale_bits + 32
    for depth in range(1, 9):
        if stored >> (depth - 1) & 1:
            levels.append(struct.unpack_from(f"<{2**depth}f", data, at))
            at += 4 * 2**depth
        else:
            levels.append(default_levels(depth))
    require(at == len(data), "size of codebook")
    return {"scale_bits": scale_bits, "scales": scales, "thresholds": thresholds, "levels": levels}


def read_file(data: bytes, entry: dict[str, Any]) -> bytes:
    """Section 7.7."""
    if "inflated_size" not in entry:
        return data
    size = entry["inflated_size"]
    require(1 <= size <= min(268_435_456, 1032 * len(data)), "inflated size")
    stream = zlib.decompressobj()
    file = stream.decompress(data, size + 1)
    require(len(file) == size and stream.eof and not stream.unused_data, "one whole stream")
    return file


def read_raw(data: bytes, entry: dict[str, Any]) -> bytes:
    """Section 9."""
    count = 1
    for dimension in entry["shape"]:
        count *= dimension
    require(len(data) == count * ELEMENT[entry["dtype"]], "size of raw tensor")
    require(entry["dtype"] != "bool" or max(data, default=0) <= 1, "bool bytes")
    return data


def read_companded(data: bytes, entry: dict[str, Any], book: dict[str, Any]) -> list[float]:
    """Sections 10 and 11: return W in C order."""
    *stack, outputs, inputs = entry["shape"]
    experts = stack[0] if stack else 1
    rows, columns = (inputs, outputs) if entry["transposed"] else (outputs, inputs)
    partition = rows // entry["partitions"]

    # 10.1: rows of each cluster, in order.
    sizes = []
    for _ in range(entry["partitions"]):
        left = partition
        while left:
            sizes.append(min(left, entry["group_size"]))
            left -= sizes[-1]
    clusters, groups = len(sizes), experts * len(sizes) * columns

    # 10.2: blocks.
    at = 0

    def block(size: int) -> bytes:
        nonlocal at
        require(at + size <= len(data), "payload holds its blocks")
        at += size
        return data[at - size : at]

    def block_stream(count: int, width: int) -> list[int]:
        return stream(block((count * width + 7) // 8), count, width)

    unit, step = struct.unpack("<ff", block(8))
    if entry["depths"] == "separable":
        column_terms = block_stream(experts * columns, entry["column_bits"])
        cluster_terms = struct.unpack(f"<{experts * clusters}h", block(2 * experts * clusters))
        depths = []
        for expert in range(experts):
            for cluster in range(clusters):
                for column in range(columns):  # 10.3
                    term = column_terms[expert * columns + column] << entry["column_shift"]
                    total = cluster_terms[expert * clusters + cluster] + term
                    depths.append(sum(threshold <= total for threshold in book["thresholds"]))
    else:
        depths = block_stream(groups, 4)
        require(max(depths) <= 8, "bit depth")
    scale_codes = block_stream(groups, book["scale_bits"])
    mean_codes = struct.unpack(f"<{groups}b", block(groups)) if entry["means"] else None
    order = [i % partition for i in range(experts * rows)]
    in_partition = sizes[: clusters // entry["partitions"]]
    if entry.get("cluster_map"):  # 10.4
        require(entry["permuted"] and len(in_partition) > 1, "cluster map of several clusters")
        named = block_stream(experts * rows, ceil_log2(len(in_partition)))
        order = []
        for first in range(0, experts * rows, partition):
            for cluster, size in enumerate(in_partition):
                members = [i for i in range(partition) if named[first + i] == cluster]
                require(len(members) == size, "cluster map names a cluster for each of its rows")
                order += members
    elif entry["permuted"]:
        order = block_stream(experts * rows, ceil_log2(partition))
    factors = [1.0] * (experts * rows)  # 10.6 and 11
    if "row_scale_bits" in entry:
        require(1 <= entry["row_scale_bits"] <= 8, "row scale bits")
        require(not entry["transposed"], "row scales of outputs that are rows")
        row_scale_codes = block_stream(experts * outputs, entry["row_scale_bits"])
        factors = [QUARTERS[v % 4] * 0.5 ** (v // 4) for v in row_scale_codes]

    weights = [0.0] * (experts * rows * columns)
    group = 0
    for expert in range(experts):
        position = 0
        for size in sizes:
            for column in range(columns):
                depth = depths[group]
                planes = [stream(block((size + 7) // 8), size, 1) for _ in range(depth)]
                scale = f32(unit * book["scales"][scale_codes[group]])
                mean = None if mean_codes is None else f32(float(mean_codes[group]) * step)
                for j in range(size):
                    code = sum(planes[b][j] << b for b in range(depth))
                    level = book["levels"][depth][code]
                    if mean is not None:
                        level = f32(level + mean)
                    stored = position + j
                    row = stored // partition * partition + order[expert * rows + stored]
                    place = column * rows + row if entry["transposed"] else row * columns + column
                    weight = f32(scale * level)
                    if "row_scale_bits" in entry:
                        weight = f32(weight * factors[expert * rows + row])
                    weights[expert * rows * columns + place] = weight
                group += 1
            position += size
    require(at == len(data), "payload has nothing else")
    return weights

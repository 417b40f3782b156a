"""Write the test vectors: python format_spec/make_vectors.py [FOLDER]

Valid files go to vectors/valid, each showing the one thing in its name, with the weights they stand
for in expected.json (little-endian float32 as hex; raw tensors and files as their bytes). Faulty
files go to vectors/faulty, with the class of error each must give and a piece of its text.
Everything comes from one seed, so that running this again changes nothing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from carried_vectors import deflated_faults, tiny_mixture, tiny_record, write_deflated
from cvxq_format import (
    Codebook,
    CompandedTensor,
    Geometry,
    Reader,
    Writer,
    bfloat16_bits,
    dequantize,
    pack_codes,
)
from faulty_vectors import Draft, faulty_vectors

SEED = 2409_02026


BOOK = Codebook.default(2)


def random_tensor(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    group_size: int,
    partitions: int = 1,
    *,
    depth: int | None = None,
    separable: bool = False,
    means: bool = False,
    permuted: bool = False,
    cluster_map: bool = False,
    row_scale_bits: int = 0,
    book: Codebook = BOOK,
    **fields: Any,
) -> CompandedTensor:
    """Return a tensor of random codes; depth: one for all groups, else random 0…8."""
    g = Geometry.of(shape, group_size, partitions, fields.get("transposed", False))
    groups = (g.experts, g.clusters, g.columns)
    if separable:
        fields["column_terms"] = rng.integers(0, 16, (g.experts, g.columns)).astype(np.uint8)
        fields["cluster_terms"] = rng.integers(-300, 1500, groups[:2]).astype(np.int16)
        fields |= {"column_bits": 4, "column_shift": 6}
        terms = (fields["column_terms"], fields["cluster_terms"], 6)
        depths = book.depths_of(*terms)
    else:
        low, high = (0, 8) if depth is None else (depth, depth)
        depths = rng.integers(low, high, groups, endpoint=True).astype(np.uint8)
    if means:
        fields["mean_codes"] = rng.integers(-128, 128, groups).astype(np.int8)
        fields["mean_step"] = np.float32(1 / 64)
    if permuted or cluster_map:
        order = [
            p * g.partition_rows + rng.permutation(g.partition_rows)
            for _ in range(g.experts)
            for p in range(partitions)
        ]
        permutation = np.concatenate(order).reshape(g.experts, g.rows)
        if cluster_map:  # ascending inside each cluster
            clusters = np.broadcast_to(g.locate(np.arange(g.rows))[0], permutation.shape)
            ascending = np.lexsort((permutation, clusters))
            permutation = np.take_along_axis(permutation, ascending, axis=1)
        fields |= {"permutation": permutation, "cluster_map": cluster_map}
    if row_scale_bits:
        shape_of_codes = (g.experts, shape[-2])
        row_scale_codes = rng.integers(0, 1 << row_scale_bits, shape_of_codes).astype(np.uint8)
        fields |= {"row_scale_codes": row_scale_codes, "row_scale_bits": row_scale_bits}
    row_depths = np.repeat(depths, g.cluster_rows(), axis=1)
    codes = rng.integers(0, 1 << row_depths.astype(np.int64)).astype(np.uint8)
    scale_codes = rng.integers(0, book.scale_table.size, groups).astype(np.uint8)
    fields = {"scale_unit": np.float32(0.05), "scale_codes": scale_codes} | fields
    return CompandedTensor(
        shape=shape,
        group_size=group_size,
        partitions=partitions,
        depths=depths,
        packed_codes=pack_codes(codes, depths, group_size, partitions),
        scale_bits=book.scale_bits,
        **fields,
    )


def worked_example() -> tuple[Codebook, CompandedTensor]:
    """Return the codebook and tensor that the appendix of FORMAT.md walks through."""
    default = Codebook.default(1)
    scales = np.array([0.5, 1.0], np.float32)
    codebook = Codebook(scales, default.depth_thresholds, default.levels)
    column_terms = np.array([[0, 1, 2, 3]], np.uint8)
    cluster_terms = np.array([[0, 300]], np.int16)
    depths = codebook.depths_of(column_terms, cluster_terms, 8)
    codes = np.array([[0, 1, 2, 7], [0, 0, 3, 4], [1, 2, 5, 9]], np.uint8)
    tensor = CompandedTensor(
        shape=(3, 4),
        group_size=2,
        partitions=1,
        scale_unit=np.float32(0.25),
        depths=depths,
        scale_codes=np.array([[[1, 0, 1, 0], [0, 1, 1, 1]]], np.uint8),
        packed_codes=pack_codes(codes, depths, 2, 1),
        mean_step=np.float32(0.125),
        mean_codes=np.array([[[-2, 0, 0, 1], [0, 0, -1, 0]]], np.int8),
        permutation=np.array([[2, 0, 1]]),
        column_terms=column_terms,
        cluster_terms=cluster_terms,
        column_bits=2,
        column_shift=8,
        scale_bits=1,
    )
    return codebook, tensor


def companded_cases(rng: np.random.Generator) -> dict[str, CompandedTensor]:
    """Return one companded tensor for each thing that a payload can show."""
    cases = {
        f"depth-{depth}-odd-width": random_tensor(rng, (8, 5), 8, depth=depth)
        for depth in range(1, 9)
    }
    zero_scales = np.zeros((1, 2, 3), np.uint8)
    cases |= {
        "depths-explicit": random_tensor(rng, (16, 6), 8),
        "depths-separable": random_tensor(rng, (16, 6), 8, separable=True),
        "depth-0-without-mean": random_tensor(rng, (8, 3), 8, depth=0),
        "depth-0-with-mean": random_tensor(rng, (8, 3), 8, depth=0, means=True),
        "means": random_tensor(rng, (16, 6), 8, means=True),
        "scale-zero": random_tensor(rng, (8, 3), 4, scale_codes=zero_scales),
        "scale-unit-zero": random_tensor(rng, (4, 3), 4, scale_unit=np.float32(0)),
        "scale-unit-subnormal": random_tensor(rng, (4, 3), 4, scale_unit=np.float32(1e-40)),
        "cluster-remainder": random_tensor(rng, (11, 4), 4, separable=True),
        "cluster-one-short": random_tensor(rng, (5, 4), 128),
        "cluster-of-one-row": random_tensor(rng, (3, 4), 1, permuted=True),
        "cluster-of-13-rows": random_tensor(rng, (26, 3), 13, permuted=True),
        "permutation": random_tensor(rng, (16, 4), 4, permuted=True),
        "permutation-odd-rows": random_tensor(rng, (11, 4), 4, permuted=True),
        "partitions": random_tensor(rng, (16, 4), 4, 2),
        "partitions-with-permutation": random_tensor(rng, (16, 4), 4, 4, permuted=True),
        "partitions-with-remainder": random_tensor(rng, (20, 3), 4, 2, permuted=True),
        "partitions-of-one-row": random_tensor(rng, (4, 3), 4, 4, permuted=True),
        "transposed": random_tensor(
            rng, (5, 12), 4, permuted=True, transposed=True, source_orientation="in_out"
        ),
        "experts": random_tensor(rng, (3, 8, 5), 4, separable=True, permuted=True),
        "experts-transposed": random_tensor(rng, (2, 5, 8), 4, means=True, transposed=True),
        "everything-at-once": random_tensor(
            rng, (2, 22, 7), 4, 2, separable=True, means=True, permuted=True
        ),
    }
    return cases


def short_book(*stored: int) -> Codebook:
    """Return a codebook that stores the level tables of some depths, which differ from the default.

    The others are the default's.
    """
    levels = [t * np.float32(1.25) if d in stored else t for d, t in enumerate(BOOK.levels, 1)]
    return replace(BOOK, levels=tuple(levels), stored_depths=stored)


def write_features(folder: Path) -> None:
    """Write a file for each thing that version 1.1 added."""
    rng = np.random.default_rng(SEED + 11)
    tiny = np.float32(1e-37)
    cases = {
        "row-scales": random_tensor(rng, (11, 4), 4, row_scale_bits=5),
        "row-scales-of-1-bit": random_tensor(rng, (9, 3), 4, row_scale_bits=1),
        "row-scales-of-8-bits": random_tensor(rng, (32, 3), 16, row_scale_bits=8),
        "row-scales-subnormal": random_tensor(rng, (8, 3), 4, row_scale_bits=6, scale_unit=tiny),
        "row-scales-of-experts": random_tensor(
            rng, (3, 8, 5), 4, means=True, permuted=True, row_scale_bits=3
        ),
        "cluster-map": random_tensor(rng, (16, 4), 4, cluster_map=True),
        "cluster-map-of-partitions": random_tensor(rng, (20, 3), 4, 2, cluster_map=True),
        "cluster-map-of-one-row": random_tensor(rng, (3, 4), 1, cluster_map=True),
        "cluster-map-of-300-clusters": random_tensor(rng, (300, 1), 1, cluster_map=True),
        "cluster-map-of-experts": random_tensor(rng, (3, 9, 2), 5, cluster_map=True),
        "cluster-map-transposed": random_tensor(
            rng, (5, 12), 4, cluster_map=True, transposed=True, source_orientation="in_out"
        ),
    }
    for name, tensor in cases.items():
        with Writer(folder / f"{name}.cvxq", [BOOK]) as writer:
            writer.add_companded("layer.weight", tensor)
    for name, book in (("codebook-short", short_book(2, 3, 5)), ("codebook-bare", short_book())):
        with Writer(folder / f"{name}.cvxq", [book]) as writer:
            writer.add_companded("layer.weight", random_tensor(rng, (8, 24), 4, book=book))
    everything = random_tensor(
        rng,
        (2, 22, 7),
        4,
        2,
        separable=True,
        means=True,
        cluster_map=True,
        row_scale_bits=5,
        codebook=1,
    )
    with Writer(folder / "everything-of-1.1.cvxq", [BOOK, short_book(1, 4)]) as writer:
        writer.add_companded("layer.weight", everything)
        writer.add_companded("plain.weight", random_tensor(rng, (8, 3), 4))
    for minor in (1, 2):
        without = Draft((folder / "bias-added.cvxq").read_bytes()).seal(minor=minor)
        (folder / f"minor-{minor}-without-features.cvxq").write_bytes(without)


def write_decoder_record(folder: Path) -> None:
    """Write a small model, each of its matrices companded or raw, with its `decoder.json`."""
    rng = np.random.default_rng(SEED + 12)
    matrices = {
        "embed.weight": (12, 6),
        "project_in.weight": (8, 6),
        "a.qkv.weight": (24, 8),
        "a.o.weight": (8, 8),
        "a.up.weight": (10, 8),
        "a.down.weight": (8, 10),
        **{f"b.{name}.weight": (8, 8) for name in "qkvo"},
        "b.gate.weight": (10, 8),
        "b.up.weight": (10, 8),
        "b.down.weight": (8, 10),
        "project_out.weight": (6, 8),
    }
    vectors = {"a.qkv.bias": 24, "a.norm.weight": 8, "a.norm.bias": 8, "b.norm": 8}
    with Writer(folder / "decoder-record.cvxq", [BOOK]) as writer:
        writer.add_file("decoder.json", json.dumps(tiny_record().to_json()).encode())
        for name, shape in matrices.items():
            writer.add_companded(name, random_tensor(rng, shape, 4, depth=4))
        writer.add_raw("positions.weight", rng.standard_normal((34, 8)).astype(np.float16))
        for name, size in vectors.items():
            writer.add_raw(name, rng.standard_normal(size).astype(np.float16))
        writer.add_alias("head.weight", "embed.weight")


def write_decoder_experts(folder: Path) -> None:
    """Write a small mixture of experts, each of its matrices companded or raw, with its record."""
    rng = np.random.default_rng(SEED + 13)
    matrices = {
        "embed.weight": (12, 8),
        **{f"{layer}.{name}.weight": (8, 8) for layer in "ab" for name in "qkvo"},
        **{f"a.experts.{e}.{name}": (10, 8) for e in range(3) for name in ("gate", "up")},
        **{f"a.experts.{e}.down": (8, 10) for e in range(3)},
        **{f"b.up.weight.{e}": (10, 8) for e in range(2)},
        **{f"b.down.weight.{e}": (8, 10) for e in range(2)},
    }
    raw = {
        "a.router.weight": (3, 8),
        "a.router.bias": (3,),
        "b.router.weight": (2, 8),
        "a.sinks": (2,),
        **{f"a.experts.bias.{e}.{name}": (10,) for e in range(3) for name in ("gate", "up")},
    }
    with Writer(folder / "decoder-experts.cvxq", [BOOK]) as writer:
        writer.add_file("decoder.json", json.dumps(tiny_mixture().to_json()).encode())
        for name, shape in matrices.items():
            writer.add_companded(name, random_tensor(rng, shape, 4, depth=4))
        for name, shape in raw.items():
            writer.add_raw(name, rng.standard_normal(shape).astype(np.float16))
        writer.add_alias("head.weight", "embed.weight")


def write_raw_dtypes(writer: Writer) -> None:
    """Store one array of every raw dtype."""
    values = np.array([0, 1, 2, 3, 100, 127])
    for dtype in ("u1", "i1", "i2", "i4", "i8"):
        writer.add_raw(f"int-{dtype}", values.astype(dtype))
    for dtype in ("f2", "f4", "f8"):
        writer.add_raw(f"float-{dtype}", (values - 50).astype(dtype) / 8)
    writer.add_raw("bool", values > 2)
    writer.add_raw("bf16", bfloat16_bits((values / 7).astype(np.float32)), "bf16")
    writer.add_raw("no-elements", np.zeros((0, 3), np.float32))
    writer.add_raw("no-dimensions", np.array(1.5, np.float32))


def write_valid(folder: Path) -> None:
    """Write the valid files."""
    rng = np.random.default_rng(SEED)
    for name, tensor in companded_cases(rng).items():
        with Writer(folder / f"{name}.cvxq", [BOOK]) as writer:
            writer.add_companded("layer.weight", tensor)
    book, example = worked_example()
    with Writer(folder / "worked-example.cvxq", [book]) as writer:
        writer.add_companded("fc.weight", example)
        bias = np.array([0x3F80, 0x0000, 0xBF00], np.uint16)
        writer.add_raw("fc.bias", bias, "bf16", added_bias=True)
        writer.add_file("config.json", b'{"model_type":"tiny"}')
    with Writer(folder / "raw-dtypes.cvxq") as writer:
        write_raw_dtypes(writer)
    with Writer(folder / "empty.cvxq"):
        pass
    with Writer(folder / "codebooks-two.cvxq", [BOOK, Codebook.default(8)]) as writer:
        writer.add_companded("a", random_tensor(rng, (8, 3), 4))
        second = random_tensor(rng, (8, 3), 4, book=Codebook.default(8), codebook=1)
        writer.add_companded("b", second)
    with Writer(folder / "alias.cvxq", [BOOK]) as writer:
        writer.add_companded("embed.weight", random_tensor(rng, (8, 3), 4))
        writer.add_alias("lm_head.weight", "embed.weight")
    with Writer(folder / "bias-added.cvxq") as writer:
        writer.add_raw("fc.bias", np.array([0.5, -0.5], np.float32), added_bias=True)
    with Writer(folder / "files-verbatim.cvxq") as writer:
        writer.add_file("chat_template.jinja", "{{ messages }}\r\n\u20ac".encode())
        writer.add_file("folder/empty.bin", b"")
    with Writer(folder / "name-not-ascii.cvxq") as writer:
        writer.add_raw("gewicht.\u03c3.\U0001d54e", np.array([1.0], np.float32))
    with Writer(folder / "unknown-optional-feature.cvxq", optional=["seen-by-nobody"]) as writer:
        writer.add_raw("w", np.array([1.0], np.float32))
    base = Draft((folder / "bias-added.cvxq").read_bytes())
    base.header["a_later_key"] = {"anything": [1, 2]}
    base.header["tensors"][0]["another_later_key"] = None
    newer = base.seal(minor=0xFFFF)
    (folder / "newer-minor-unknown-key.cvxq").write_bytes(newer)
    base = Draft((folder / "bias-added.cvxq").read_bytes())
    (folder / "preamble-unused-bytes.cvxq").write_bytes(base.seal(unused=b"\xa5" * 16))


def expected(path: Path) -> dict[str, Any]:
    """Return what a decoder must find in a valid file."""
    with Reader(path) as reader:
        tensors: dict[str, Any] = {}
        for name in reader.names:
            tensor = reader.read(name)
            if isinstance(tensor, CompandedTensor):
                weights = dequantize(tensor, reader.codebook(tensor.codebook))
                found = {"dtype": "f32", "data": weights.astype("<f4").tobytes().hex()}
            else:
                found = {"dtype": tensor.dtype, "data": tensor.data.tobytes().hex()}
            tensors[name] = {"shape": list(tensor.shape), **found}
        files = {name: reader.file(name).hex() for name in reader.files}
        return {"tensors": tensors, "aliases": reader.aliases, "files": files}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="ascii")


def main(folder: Path) -> None:
    """Write all vectors and what to expect of them below `folder`."""
    valid, faulty = folder / "valid", folder / "faulty"
    for place in (valid, faulty):
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("*.cvxq"):
            old.unlink()
    write_valid(valid)
    write_features(valid)
    write_deflated(valid)
    write_decoder_record(valid)
    write_decoder_experts(valid)
    write_json(valid / "expected.json", {p.name: expected(p) for p in sorted(valid.glob("*.cvxq"))})
    errors = {}
    for name, data, error, text in (*faulty_vectors(valid), *deflated_faults(valid)):
        (faulty / f"{name}.cvxq").write_bytes(data)
        errors[f"{name}.cvxq"] = {"error": error, "text": text}
    write_json(faulty / "expected.json", errors)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "vectors")

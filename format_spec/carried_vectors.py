"""Vectors of carried files: deflated ones, right and wrong, and a `decoder.json`.

`make_vectors.py` writes them out.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cvxq_format import Writer
from cvxq_format.decoder_record import (
    Attention,
    DecoderRecord,
    Experts,
    FeedForward,
    Layer,
    Norm,
    Part,
    Rope,
    Rows,
)
from faulty_vectors import Draft, Fault


def write_deflated(folder: Path) -> None:
    """Write files that hold carried files deflated, which version 1.2 added."""
    vocabulary = {f"token{i}": i for i in range(400)}
    with Writer(folder / "files-deflated.cvxq") as writer:
        writer.add_file("config.json", b"{}" * 400)
        writer.add_file("tokenizer.json", json.dumps(vocabulary).encode())
    draft = Draft((folder / "files-deflated.cvxq").read_bytes())
    longer = bytes.fromhex("78 01  01 0100 feff 41  00420042")  # "A", not compressed at all
    draft.replace("files", 1, longer, inflated_size=1)
    (folder / "files-deflated-longer.cvxq").write_bytes(draft.seal())


def tiny_record() -> DecoderRecord:
    """Return the record of a decoder that has a bit of everything."""

    def norm(name: str) -> Norm:
        return Norm("layer", 1e-5, f"{name}.weight", f"{name}.bias")

    rope = Rope((1.0, 0.01), 1.0, 16, (0.5, 0.001), 1.1902380714238083)
    fused = [Part("a.qkv.weight", "a.qkv.bias", Rows(4 * i, 4, 12)) for i in range(3)]
    first = Layer(
        Attention(*fused, Part("a.o.weight"), 0.5, softcap=50.0, window=8, rope=0),
        FeedForward(Part("a.up.weight"), Part("a.down.weight"), "gelu_tanh"),
        parallel=True,
        attention_in=norm("a.norm"),
        ffn_in=norm("a.norm"),
    )
    qkv = [Part(f"b.{name}.weight") for name in ("q", "k", "v")]
    rms = Norm("rms", 1e-6, "b.norm", offset=1.0)
    head_norm = Norm("rms", 1e-6)
    second = Layer(
        Attention(*qkv, Part("b.o.weight"), 0.5, head_norm, head_norm, rope=1),
        FeedForward(Part("b.up.weight"), Part("b.down.weight"), "silu", Part("b.gate.weight")),
        attention_out=rms,
        ffn_sum=rms,
    )
    return DecoderRecord(
        vocabulary=12,
        hidden=8,
        heads=2,
        kv_heads=2,
        head_dim=4,
        ffn=10,
        context=32,
        embedding_width=6,
        embedding="embed.weight",
        head=Part("head.weight"),
        layers=(first, second),
        ropes=(rope, Rope((1.0,))),
        final_norm=rms,
        positions="positions.weight",
        position_offset=2,
        project_in=Part("project_in.weight"),
        project_out=Part("project_out.weight"),
        embedding_scale=2.449489742783178,
        residual_scale=0.5,
        logit_scale=0.0625,
        logit_softcap=30.0,
        end_tokens=(2, 11),
    )


def tiny_mixture() -> DecoderRecord:
    """Return a record with what version 2 added: experts of both kinds of shares, bounds, sinks."""
    experts = Experts(3, 2, Part("a.router.weight", "a.router.bias"), "of_chosen")
    gate, up = (Part(f"a.experts.*.{name}", f"a.experts.bias.*.{name}") for name in ("gate", "up"))
    bounds = {"limit": 7.0, "slope": 1.702, "up_offset": 1.0}
    first = Layer(
        Attention(*(Part(f"a.{name}.weight") for name in "qkvo"), 0.5, sinks="a.sinks"),
        FeedForward(up, Part("a.experts.*.down"), "silu", gate, **bounds, experts=experts),
    )
    second = Layer(
        Attention(*(Part(f"b.{name}.weight") for name in "qkvo"), 0.5),
        FeedForward(
            Part("b.up.weight.*"),
            Part("b.down.weight.*"),
            "relu",
            experts=Experts(2, 1, Part("b.router.weight"), "of_all"),
        ),
    )
    return DecoderRecord(
        vocabulary=12,
        hidden=8,
        heads=2,
        kv_heads=2,
        head_dim=4,
        ffn=10,
        context=32,
        embedding_width=8,
        embedding="embed.weight",
        head=Part("head.weight"),
        layers=(first, second),
    )


def deflated_faults(valid: Path) -> Iterator[Fault]:
    """Faults of deflated files, which version 1.2 added."""
    good = (valid / "files-deflated.cvxq").read_bytes()
    entry = Draft(good).header["files"][1]
    start, size = entry["offset"], entry["inflated_size"]
    stream = good[start : start + entry["size"]]
    data = zlib.decompress(stream)
    where = f"file 'tokenizer.json' at byte {start:#x}: "

    def keys(name: str, message: str, **values: Any) -> Fault:
        return name, Draft(good).set("files", 1, **values).seal(), "CorruptError", message

    def section(name: str, other: bytes, message: str) -> Fault:
        changed = Draft(good).replace("files", 1, other)
        return name, changed.seal(), "CorruptError", where + message

    bomb = Draft(good).replace("files", 1, zlib.compress(bytes(4 << 20), 9))
    goes_on = f"{where}its zlib stream goes on after the {size} bytes stated"
    yield "deflated-bomb", bomb.seal(), "CorruptError", goes_on
    yield keys("deflated-size-too-small", f"{where}its zlib stream goes on", inflated_size=size - 1)
    message = f"{where}its zlib stream has {size} bytes, {size + 1} stated"
    yield keys("deflated-size-too-large", message, inflated_size=size + 1)
    most = 1032 * len(stream)
    message = f"file 'tokenizer.json' inflates from {len(stream)} to {most + 1} bytes, allowed 1032"
    yield keys("deflated-beyond-what-deflate-can", message, inflated_size=most + 1)
    for name, wrong in (("zero", 0), ("giant", (256 << 20) + 1), ("boolean", True)):
        message = f"'inflated_size': {wrong}, allowed an integer from 1 to 268435456"
        yield keys(f"deflated-size-{name}", message, inflated_size=wrong)
    yield section("deflated-cut-short", stream[:-1], "its zlib stream ends early")
    yield section("deflated-cut-in-half", stream[: len(stream) // 2], "its zlib stream ends early")
    yield section("deflated-and-more", stream + b"\0", "bytes follow its zlib stream")
    yield section("deflated-twice-over", stream + stream, "bytes follow its zlib stream")
    damaged = "its zlib stream is damaged"
    yield section("deflated-checksum-inside", stream[:-1] + bytes([stream[-1] ^ 1]), damaged)
    yield section("deflated-without-zlib-header", stream[2:-4], damaged)
    yield section("deflated-as-gzip", b"\x1f\x8b\x08" + stream[3:], damaged)
    primed = zlib.compressobj(9, zdict=data[:100])
    dictionary = primed.compress(data) + primed.flush()
    yield section("deflated-with-dictionary", dictionary, damaged)
    message = f"{where}checksum differs"
    yield keys("deflated-checksum-of-the-file", message, crc32=zlib.crc32(data))
    flipped = Draft(good)
    flipped.body[start + 100] ^= 1
    yield "deflated-checksum", flipped.seal(), "CorruptError", message
